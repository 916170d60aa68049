"""What one recommendation costs, from a user's history to item ids and titles.

Methods, on one backbone (but for the last):

* R²ec direct: prompt, one pass, item head.
* R²ec reasoned at R: a greedy reasoning of exactly R tokens first.
* constrained beams: the backbone writes the title, 20 beams over the catalog's prefix tree, by
  transformers and by our own search with a shared prefill.
* SASRec + item head: the floor, no language model.
* R²ec reasoned on vLLM, where it is installed.

Stages: assembly (history -> token ids), prefill, decode, read-out (vLLM: one pass over prompt and
reasoning), head (exact top-K, the user's own items excluded), ids (internal -> external, titles).
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from beam_search import SharedBeams, Title, Trie, title_log_probs, transformers_beams
from harness import Case, Entry, Stages, Unavailable, Wrong, relative_error, require
from sasrec import SASRec
from workload import Workload

from r2ec_fast.model.hf_compat import attention_implementation
from r2ec_fast.model.prefix_cache import KnownPrefix
from r2ec_fast.rollout import RolloutEngine, Rollouts, TransformersEngine
from r2ec_fast.rollout import transformers_engine as engine_module
from r2ec_kernels import ItemIndex, item_topk

SUITE = "end_to_end"
K = 10
BEAMS = 20
REASONING = (32, 128, 512)
BATCHES = (1, 8, 32)
NEVER = "\u0001\u0002\u0001"  # a marker no model writes: a reasoning runs its full length
DIRECT, OURS, PEER = "R2ec direct", f"{BEAMS} beams, shared prefill", f"{BEAMS} beams, transformers"
FLOOR = "SASRec + item head"
BARS = ((PEER, 10.0), (OURS, 4.0))  # the aims: direct at batch 1 is at least so many times faster


class Served(NamedTuple):
    """What a call returns beside its recommendations, for the gate."""

    recommended: list[list[tuple[str, str]]]  # (item id, title), best first
    states: torch.Tensor | None = None
    items: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    rows: list[list[int]] | None = None  # token rows the states were read from
    titles: list[list[Title]] | None = None


@dataclass
class Bench:
    """A workload and what the methods keep between calls, as a server would."""

    work: Workload
    beams: int = BEAMS
    state_limit: float = 1e-3  # relative error of a state; bfloat16 allows more
    score_limit: float = 1e-3  # of a title's log-probability, relative
    strays: float = 0.0  # share of titles that one search alone may find
    kept: dict[str, list[Title]] = field(default_factory=dict)  # user 0's titles at batch 1

    def prepare(self) -> None:
        """Make what a server makes once, so that no first call pays for it."""
        _ = self.trie, self.prefix, self.engine, self.shared_beams, self.floor

    @functools.cached_property
    def trie(self) -> Trie:
        return Trie(self.work.titles, self.work.eos)

    @functools.cached_property
    def prefix(self) -> KnownPrefix:
        return self.work.model.known_prefix(self.work.builder)

    @functools.cached_property
    def engine(self) -> TransformersEngine:
        work = self.work
        return TransformersEngine(
            work.model.backbone,
            work.model.tokenizer,
            NEVER,
            work.builder.marker_ids,
            eos_token_ids=[],
            prefix=self.prefix,
            keep_packed=True,
        )

    @functools.cached_property
    def shared_beams(self) -> SharedBeams:
        # modules of its own around the same weights: their reordered copies serve nobody else
        backbone = self.work.model.backbone
        same = {id(t): t for t in (*backbone.parameters(), *backbone.buffers())}
        return SharedBeams(
            copy.deepcopy(backbone, same), self.trie, beams=self.beams, prefix=self.prefix
        ).__enter__()

    @functools.cached_property
    def vllm(self) -> RolloutEngine:
        importlib.import_module("vllm")  # a missing vLLM is said before anything else
        if self.work.folder is None:
            raise Unavailable("vLLM loads a folder: name one with --model")
        from r2ec_fast.rollout.vllm.engine import VLLMEngine

        llm = VLLMEngine.launch(self.work.folder, max_model_length=4096)
        marker_ids = self.work.builder.marker_ids
        return VLLMEngine(
            llm, self.work.model.tokenizer, NEVER, marker_ids, eos_token_ids=[self.work.eos]
        )

    @functools.cached_property
    def floor(self) -> tuple[SASRec, ItemIndex]:
        model = SASRec(len(self.work.catalog)).to(self.work.device).eval()
        return model, ItemIndex(model.table.detach().float())


# ---- the methods -------------------------------------------------------------------------------


def prompts_of(bench: Bench, batch: int, stages: Stages) -> list[list[int]]:
    with stages("assembly"):
        return [bench.work.builder.user_ids(user) for user in bench.work.users[:batch]]


def exclude_of(bench: Bench, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    seen = [torch.from_numpy(np.unique(user.items)) for user in bench.work.users[:batch]]
    offsets = torch.tensor([0, *np.cumsum([len(items) for items in seen])])
    device = bench.work.device
    return torch.cat(seen).to(device), offsets.to(device)


def named(bench: Bench, indices: Sequence[Sequence[int]]) -> list[list[tuple[str, str]]]:
    ids, titles = bench.work.catalog.ids, bench.work.catalog.titles
    return [[(ids[i], titles[i]) for i in row if i >= 0] for row in indices]


def head_and_names(bench: Bench, states: torch.Tensor, rows, stages: Stages) -> Served:
    with stages("head"):
        best = bench.work.model.top_items(states, K, exclude=exclude_of(bench, len(states)))
    with stages("ids"):
        recommended = named(bench, best.indices.tolist())
    return Served(recommended, states, best.indices, best.scores, rows)


def direct(bench: Bench, batch: int, stages: Stages) -> Served:
    marker = bench.work.builder.marker_ids
    rows = [[*prompt, *marker] for prompt in prompts_of(bench, batch, stages)]
    with stages("prefill"):
        states = bench.work.model.encode_rows(rows, prefix=bench.prefix)
    return head_and_names(bench, states, rows, stages)


def write_reasoning(bench: Bench, prompts: list[list[int]], tokens: int, stages: Stages):
    """The engine's rollouts, its prefill and its decoding timed apart."""
    decoder = engine_module.DECODERS[bench.engine.decoder]

    with stages("decode") as decode:

        class Timed(decoder):
            def start(self, *arguments: object) -> torch.Tensor:
                with stages("prefill") as prefill:
                    logits = super().start(*arguments)
                decode.less += prefill.elapsed
                return logits

        with mock.patch.dict(engine_module.DECODERS, {bench.engine.decoder: Timed}):
            return bench.engine.generate(
                prompts,
                user_keys=range(len(prompts)),
                num_generations=1,
                max_completion_length=tokens,
                greedy=True,
                states=True,
            )


def reasoned(bench: Bench, batch: int, tokens: int, stages: Stages) -> Served:
    prompts = prompts_of(bench, batch, stages)
    out = write_reasoning(bench, prompts, tokens, stages)
    return head_and_names(bench, out.states, whole_rows(prompts, out), stages)


def whole_rows(prompts: list[list[int]], out: Rollouts) -> list[list[int]]:
    return [[*prompt, *out.row(i).tolist()] for i, prompt in enumerate(prompts)]


def read_out(bench: Bench, prompts: list[list[int]], out: Rollouts, stages: Stages) -> Served:
    rows = whole_rows(prompts, out)
    with stages("read-out"):
        states = bench.work.model.encode_rows(rows, prefix=bench.prefix)
    return head_and_names(bench, states, rows, stages)


def beams(bench: Bench, batch: int, search: Callable, stages: Stages) -> Served:
    prompts = prompts_of(bench, batch, stages)
    with stages("search"):
        titles = search(prompts)
    with stages("ids"):
        seen = [set(user.items.tolist()) for user in bench.work.users[:batch]]
        fresh = [
            [title.item for title in found if title.item not in own][:K]
            for found, own in zip(titles, seen, strict=True)
        ]
        recommended = named(bench, fresh)
    return Served(recommended, titles=titles)


@torch.no_grad()
def floor(bench: Bench, batch: int, stages: Stages) -> Served:
    model, index = bench.floor
    with stages("assembly"):
        rows = model.rows([user.items for user in bench.work.users[:batch]])
    with stages("prefill"):
        states = model(rows.to(bench.work.device))
    with stages("head"):
        best = index.search(states.float(), K, exclude=exclude_of(bench, batch))
    with stages("ids"):
        recommended = named(bench, best.indices.tolist())
    return Served(recommended, states, best.indices, best.scores, rows.tolist())


def on_vllm(bench: Bench, batch: int, tokens: int, stages: Stages) -> Served:
    """As `reasoned`, with reasonings that vLLM writes; it may read its weights in another type."""
    prompts = prompts_of(bench, batch, stages)
    with stages("prefill + decode"):
        out = bench.vllm.generate(
            prompts,
            user_keys=range(len(prompts)),
            num_generations=1,
            max_completion_length=tokens,
            greedy=True,
        )
    return read_out(bench, prompts, out, stages)


# ---- the gates ---------------------------------------------------------------------------------


@torch.no_grad()
def check_states(bench: Bench, served: Served, written: int) -> float:
    """States against plain passes of the whole rows; the top K against the reference head.

    ``written``: tokens of a reasoning, which must be the most likely ones (the last ``written``
    before the marker).
    """
    model, marker = bench.work.model, len(bench.work.builder.marker_ids)
    worst = 0.0
    for row in {0, len(served.rows) - 1}:
        ids = torch.tensor([served.rows[row]], device=model.device)
        with attention_implementation(model.language_model, "eager"):
            decoder = model.language_model.get_decoder()
            states = decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
        error = relative_error(served.states[row], states[-1])
        worst = max(worst, require(error, bench.state_limit, f"state of user {row}"))
        if written:
            end = ids.shape[1] - marker
            head = model.language_model.get_output_embeddings()
            logits = head(states[end - written - 1 : end - 1]).float()
            chosen = logits.gather(1, ids[0, end - written : end, None])
            gap = (logits.max(1, keepdim=True).values - chosen).max() / logits.abs().max()
            require(float(gap), bench.state_limit, f"greedy tokens of user {row}")
    index = model.index
    check_head(bench, served, index.items, index.similarity, index.temperature)
    return worst


def check_head(
    bench: Bench, served: Served, table: torch.Tensor, similarity: str, temperature: float
) -> None:
    """The top K of the states, bit for bit, against the definition; and the names."""
    right = item_topk(
        served.states.to(table.dtype),
        table,
        K,
        similarity=similarity,
        temperature=temperature,
        exclude=exclude_of(bench, len(served.states)),
        impl="reference",
    )
    if not torch.equal(right.indices, served.items) or not torch.equal(right.scores, served.scores):
        raise Wrong(f"top {K} differs from the reference implementation")
    if served.recommended != named(bench, right.indices.tolist()):
        raise Wrong("ids or titles do not belong to the top items")


@torch.no_grad()
def check_floor(bench: Bench, served: Served) -> float:
    """SASRec's states against float64, a user at a time without padding."""
    model, index = bench.floor
    exact = copy.deepcopy(model).double()
    rows = [[item for item in row if item != model.embed.padding_idx] for row in served.rows]
    right = torch.cat([exact(torch.tensor([row], device=bench.work.device)) for row in rows])
    error = require(relative_error(served.states, right), bench.state_limit, "states")
    check_head(bench, served, index.items, index.similarity, index.temperature)
    return error


def check_beams(bench: Bench, served: Served, name: str) -> float:
    """User 0's titles: scores of the best three and the last by plain passes; the same list from
    every search.

    Where two searches order titles differently their scores must be equal within the limit.
    """
    work, found = bench.work, served.titles[0]
    prompt = work.builder.user_ids(work.users[0])
    checked = [*found[:3], *found[3:][-1:]]
    rows = [work.titles[title.item] for title in checked]
    exact = title_log_probs(work.model.language_model, prompt, rows, work.eos)
    worst = 0.0
    for title, right in zip(checked, exact, strict=True):
        error = abs(title.score - right) / max(1.0, abs(right))
        worst = max(worst, require(error, bench.score_limit, f"score of title {title.item}"))
    for other, titles in bench.kept.items():
        what = f"{name} against {other}"
        if bench.strays:
            mostly_same_titles(found, titles, bench.strays, what)
        else:
            same_titles(found, titles, bench.score_limit, what)
    bench.kept[name] = found
    return worst


def same_titles(found: Sequence[Title], right: Sequence[Title], limit: float, what: str) -> None:
    """Raise `Wrong` unless both lists hold the same titles, but for near-ties at a place."""
    if len(found) != len(right):
        raise Wrong(f"{what}: {len(found)} titles, expected {len(right)}")
    for place, (a, b) in enumerate(zip(found, right, strict=True), start=1):
        gap = abs(a.score - b.score) / max(1.0, abs(b.score))
        if gap > limit:
            raise Wrong(f"{what}: place {place} has score {a.score:.4f}, expected {b.score:.4f}")
    near = {t.item for t in right} ^ {t.item for t in found}
    last = right[-1].score if right else 0.0
    for title in (*found, *right):
        if title.item in near and abs(title.score - last) > limit * max(1.0, abs(last)):
            raise Wrong(f"{what}: title {title.item} is in one list only")


def mostly_same_titles(
    found: Sequence[Title], right: Sequence[Title], strays: float, what: str
) -> None:
    """Raise `Wrong` where more than a share of ``strays`` of either list is missing from the other:
    in 16 bits a beam that one search drops for a rounding may lead to a title that stays."""
    common = {title.item for title in found} & {title.item for title in right}
    most = max(len(found), len(right))
    if len(common) < (1 - strays) * most:
        raise Wrong(f"{what}: {len(common)} titles in common of {most}")


# ---- the suite ---------------------------------------------------------------------------------


def method_names(reasoning: Sequence[int]) -> tuple[str, ...]:
    written = tuple(f"R2ec reasoned, {tokens} tokens" for tokens in reasoning)
    return (DIRECT, OURS, written[0], FLOOR, PEER, *written[1:], f"vLLM, {reasoning[0]} tokens")


def entries(
    bench: Callable[[], Bench],
    *,
    label: str,
    batches: Sequence[int] = BATCHES,
    reasoning: Sequence[int] = REASONING,
    suite: str = SUITE,
) -> Iterator[Entry]:
    """One entry a batch size; ``bench`` is made when the first is built."""
    names = method_names(reasoning)
    for batch in batches:
        build = functools.partial(cases, bench, batch, reasoning)
        yield Entry(suite, f"recommend, {label}", {"B": batch}, names, build, versus=PEER)


def cases(make: Callable[[], Bench], batch: int, reasoning: Sequence[int]) -> list[Case]:
    bench = make()
    bench.prepare()
    device = bench.work.device
    made = []

    def add(name: str, call: Callable[[Stages], Served], check: Callable, **more: object) -> None:
        stages = Stages(device)
        made.append(
            Case(
                name,
                lambda: call(stages),
                check,
                work=batch,
                unit="users",
                stages=stages,
                cost=(f"{SUITE} {name}", batch),
                **more,
            )
        )

    def add_reasoned(name: str, tokens: int) -> None:
        add(
            name,
            lambda stages: reasoned(bench, batch, tokens, stages),
            lambda served: check_states(bench, served, tokens),
        )

    def add_beams(name: str, search: Callable) -> None:
        add(
            name,
            lambda stages: beams(bench, batch, search, stages),
            lambda served: check_beams(bench, served, name),
        )

    def by_transformers(prompts: list[list[int]]) -> list[list[Title]]:
        model = bench.work.model.language_model
        return transformers_beams(model, prompts, bench.trie, beams=bench.beams)

    names = method_names(reasoning)
    add(
        DIRECT,
        lambda stages: direct(bench, batch, stages),
        lambda served: check_states(bench, served, 0),
    )
    add_beams(OURS, lambda prompts: bench.shared_beams.search(prompts))
    add_reasoned(names[2], reasoning[0])
    add(
        FLOOR,
        lambda stages: floor(bench, batch, stages),
        lambda served: check_floor(bench, served),
    )
    add_beams(PEER, by_transformers)
    for name, tokens in zip(names[5:-1], reasoning[1:], strict=True):
        add_reasoned(name, tokens)
    add(
        names[-1],
        lambda stages: on_vllm(bench, batch, reasoning[0], stages),
        lambda served: check_states(bench, served, 0),
        prepare=lambda: bench.vllm,
    )
    return made
