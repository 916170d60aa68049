"""Generating an item's title by constrained beam search: what D3, BIGRec and LLaRA do.

Only titles of the catalog can come out: a prefix tree says which tokens may follow. A title's score
is the log-probability of its tokens and the end token after the prompt, without length penalty. Two
searches with the same rules:

* `transformers_beams`: `generate(num_beams=..., prefix_allowed_tokens_fn=...)`.
* `SharedBeams`: one prefill a prompt whose cache all beams share (the decoder of the rollout
  engine), products on reordered weights, and candidates drawn from the tree's children alone.

The rules, those of transformers: of the 2 * beams best continuations, those that end a title are
finished if they are among the best ``beams``; the best ``beams`` others go on; a user is done when
no open beam can beat the worst of ``beams`` finished titles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from r2ec_fast.model.hf_compat import attention_implementation, eval_mode, model_device
from r2ec_fast.model.prefix_cache import KnownPrefix
from r2ec_fast.rollout.onednn_linear import MIN_STEPS, packed_linears
from r2ec_fast.rollout.shared_prompt.decoder import SharedPromptDecoder

NONE = -torch.inf
LOWEST = -1e8  # transformers marks beams that do not exist by about -1e9


class Title(NamedTuple):
    """A generated title: its row in the catalog, and its log-probability."""

    item: int
    score: float


class Trie:
    """The prefix tree of titles (token ids, each ended by ``eos``).

    Nodes are numbered; ``tokens[node]`` and ``children[node]``, [nodes, widest], are padded with
    -1. The child of an end token is not a node: ``item[node]`` is the row of the title that ends
    there (the first of equal titles), or -1.
    """

    def __init__(self, titles: Sequence[Sequence[int]], eos: int) -> None:
        self.eos = eos
        edges: list[dict[int, int]] = [{}]
        items: list[int] = [-1]
        for row, title in enumerate(titles):
            if eos in title or not len(title):
                raise ValueError(f"titles[{row}]: expected tokens without the end token {eos}")
            node = 0
            for token in title:
                if token not in edges[node]:
                    edges[node][token] = len(edges)
                    edges.append({})
                    items.append(-1)
                node = edges[node][token]
            if items[node] < 0:
                items[node] = row
        self.edges = edges
        self.item = torch.tensor(items)
        self.longest = max(map(len, titles))
        width = max(len(e) + (i >= 0) for e, i in zip(edges, items, strict=True))
        self.tokens = torch.full((len(edges), width), -1)
        self.children = torch.full((len(edges), width), -1)
        for node, edge in enumerate(edges):
            ends = [(eos, -1)] if items[node] >= 0 else []
            pairs = torch.tensor([*edge.items(), *ends]).view(-1, 2)
            self.tokens[node, : len(pairs)] = pairs[:, 0]
            self.children[node, : len(pairs)] = pairs[:, 1]

    def to(self, device: torch.device) -> Trie:
        for name in ("item", "tokens", "children"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def walk(self, tokens: Sequence[int]) -> int:
        """The node of a prefix, or -1."""
        node = 0
        for token in tokens:
            node = self.edges[node].get(token, -1)
            if node < 0:
                return -1
        return node


def allowed_tokens(trie: Trie, prompt_length: int):
    """``prefix_allowed_tokens_fn`` for prompts (padded) to ``prompt_length`` tokens."""
    allowed = [
        [*edges, *([trie.eos] if item >= 0 else [])]
        for edges, item in zip(trie.edges, trie.item.tolist(), strict=True)
    ]

    def function(_: int, ids: Tensor) -> list[int]:
        node = trie.walk(ids[prompt_length:].tolist())
        return allowed[node] if node >= 0 else [trie.eos]  # a dead beam: its score stays -inf

    return function


@torch.no_grad()
def transformers_beams(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], trie: Trie, *, beams: int
) -> list[list[Title]]:
    """The best titles of each prompt, best first, by transformers' own beam search."""
    longest = max(map(len, prompts))
    pad = [[trie.eos] * (longest - len(prompt)) for prompt in prompts]
    device = model_device(model)
    ids = torch.tensor([[*p, *row] for p, row in zip(pad, prompts, strict=True)], device=device)
    mask = torch.tensor(
        [[0] * len(p) + [1] * len(row) for p, row in zip(pad, prompts, strict=True)], device=device
    )
    with eval_mode(model):
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=0.0,
            early_stopping=False,
            max_new_tokens=trie.longest + 1,
            eos_token_id=trie.eos,
            pad_token_id=trie.eos,
            prefix_allowed_tokens_fn=allowed_tokens(trie, longest),
            return_dict_in_generate=True,
            output_scores=True,  # there are no sequence scores without it
        )
    found = []
    for row in range(len(prompts)):
        part = slice(row * beams, (row + 1) * beams)
        titles = []
        scores = out.sequences_scores[part].tolist()
        for tokens, score in zip(out.sequences[part, longest:].tolist(), scores, strict=True):
            node = trie.walk(tokens[: tokens.index(trie.eos)]) if trie.eos in tokens else -1
            if node >= 0 and score > LOWEST:
                titles.append(Title(int(trie.item[node]), score))
        found.append(titles)
    return found


class SharedBeams:
    """Beam search over one shared prompt cache a user.

    Args:
        model: a causal language model that the shared-prompt decoder knows.
        trie: the titles.
        beams: beams a user.
        prefix: what all prompts begin with, computed already.

    A context manager: the weights are reordered for products of a few rows on entry (on CPUs), as a
    server would do once.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        trie: Trie,
        *,
        beams: int,
        prefix: KnownPrefix | None = None,
    ) -> None:
        self.model, self.beams, self.prefix = model, beams, prefix
        self.trie = trie.to(model_device(model))
        self.steps = 0  # decoding steps of the last search

    def __enter__(self) -> SharedBeams:
        self._packed = packed_linears(self.model, MIN_STEPS)
        self._packed.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._packed.__exit__(*error)

    @torch.no_grad()
    def search(self, prompts: Sequence[Sequence[int]]) -> list[list[Title]]:
        """The best titles of each prompt, best first; at most ``beams``."""
        decoder = SharedPromptDecoder(self.model, self.prefix)
        with decoder.session(), eval_mode(self.model):
            logits = decoder.start(prompts, self.beams, self.trie.longest + 1)
            return self._search(decoder, logits, len(prompts))

    def _search(
        self, decoder: SharedPromptDecoder, logits: Tensor, users: int
    ) -> list[list[Title]]:
        beams, device = self.beams, logits.device
        # one beam to begin with: all start from the same prompt
        score = torch.full((users, beams), NONE, device=device)
        score[:, 0] = 0.0
        node = torch.zeros(users, beams, dtype=torch.int64, device=device)
        best = torch.full((users, beams), NONE, device=device)
        best_item = torch.full_like(node, -1)
        first_slot = torch.arange(users, device=device)[:, None] * beams
        self.steps = 0
        while True:
            total, parent, token, child = self._continuations(logits, score, node)
            ended = (token == self.trie.eos) & (total > NONE)
            ended[:, beams:] = False
            item = self.trie.item[node.gather(1, parent)]
            pool = torch.cat([best, total.masked_fill(~ended, NONE)], 1)
            best, chosen = pool.topk(beams, dim=1)
            best_item = torch.cat([best_item, item], 1).gather(1, chosen)
            score, chosen = total.masked_fill(token == self.trie.eos, NONE).topk(beams, dim=1)
            if not bool((score[:, 0] > best[:, -1]).any()):
                return [
                    [Title(int(i), float(s)) for s, i in zip(*user, strict=True) if s > NONE]
                    for user in zip(best.tolist(), best_item.tolist(), strict=True)
                ]
            parent, token = parent.gather(1, chosen), token.gather(1, chosen)
            node = child.gather(1, chosen).clamp(min=0)
            self._reorder(decoder, (first_slot + parent).flatten())
            logits = decoder.step(token.clamp(min=0).flatten(), None)
            self.steps += 1

    def _continuations(
        self, logits: Tensor, score: Tensor, node: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The 2 * beams best: total score, beam it continues, token, node; each [users, 2 beams].

        Where there are fewer, the rest have score -inf."""
        users, beams = score.shape
        token, child = self.trie.tokens[node], self.trie.children[node]  # [users, beams, widest]
        log_prob = logits.float().log_softmax(-1).view(users, beams, -1)
        total = log_prob.gather(2, token.clamp(min=0)).masked_fill_(token < 0, NONE)
        total = (total + score[:, :, None]).flatten(1)
        count = min(2 * beams, total.shape[1])
        total, place = total.topk(count, dim=1)
        short = (0, 2 * beams - count)
        total = torch.nn.functional.pad(total, short, value=NONE)
        place = torch.nn.functional.pad(place, short)
        parent = place // token.shape[2]
        token, child = token.flatten(1).gather(1, place), child.flatten(1).gather(1, place)
        return total, parent, token, child

    @staticmethod
    def _reorder(decoder: SharedPromptDecoder, slots: Tensor) -> None:
        """Give each beam the suffix of the beam it continues."""
        cache = decoder._cache
        used = cache.suffix_length
        if not used:
            return
        for keys, values in cache.suffix:
            for stored in (keys, values):
                stored[:, :, :used] = stored[slots, :, :used]


@torch.no_grad()
def title_log_probs(
    model: torch.nn.Module, prompt: Sequence[int], titles: Sequence[Sequence[int]], eos: int
) -> list[float]:
    """Log-probability of each title (and the end token) after ``prompt``, by plain full passes."""
    scores = []
    with eval_mode(model), attention_implementation(model, "eager"):
        for title in titles:
            target = torch.tensor([*title, eos], device=model_device(model))
            ids = torch.tensor([[*prompt, *title]], device=model_device(model))
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
            log_prob = logits.double().log_softmax(-1).gather(1, target[:, None])
            scores.append(float(log_prob.sum()))
    return scores
