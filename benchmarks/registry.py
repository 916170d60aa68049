"""The suites by name. Listing builds nothing; peers are imported where their rows are built."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import end_to_end
import item_head
import kernel_rows
import loss_peers
import numpy as np
import packing
import rollout
import torch
from harness import Case, Entry, Wrong, relative_error, require
from machine import compute_dtype, model_dtype
from workload import make_workload, random_model, small_tokenizer

from r2ec_kernels import ItemIndex, item_topk, target_stats

LIBRARIES = ("item_head", "losses", "packing", "rollout")
K = 10


@dataclass(frozen=True)
class Options:
    """What the command line says about the work. ``tiny``: sizes for a smoke test; ``dtype``: of
    language models, "" for the device's (``machine.model_dtype``; float32 in a tiny size)."""

    device: str = "cpu"
    model: str | None = None
    titles: Path | None = None
    tiny: bool = False
    dtype: str = ""

    @property
    def model_dtype(self) -> torch.dtype:
        if self.dtype:
            return getattr(torch, self.dtype)
        return torch.float32 if self.tiny and self.device == "cpu" else model_dtype(self.device)

    @property
    def size(self) -> str:
        """The published shape of a random model."""
        return "toy" if self.tiny else {"cuda": "Qwen2.5-1.5B"}.get(self.device, "SmolLM2-135M")

    @property
    def label(self) -> str:
        return f"{self.size} random weights" if self.model is None else Path(self.model).name


def suites() -> dict[str, Callable[[Options], Iterator[Entry]]]:
    """Name -> entries of a suite."""
    return {
        "end_to_end": end_to_end_entries,
        "item_head": item_head_entries,
        "losses": loss_entries,
        "packing": packing_entries,
        "rollout": rollout_entries,
        "scale": scale_entries,
        "kernels": kernel_entries,
        "smoke": smoke_entries,
    }


def all_entries(names: Sequence[str], options: Options) -> list[Entry]:
    """The entries of the named suites. ValueError names an unknown one."""
    known = suites()
    for name in names:
        if name not in known:
            raise ValueError(f"suite: expected one of {', '.join(known)}, got {name!r}")
    return [entry for name in names for entry in known[name](options)]


def kernel_entries(options: Options) -> Iterator[Entry]:
    """Triton kernels; tiny where there is no GPU, for Triton's interpreter."""
    yield from kernel_rows.entries(options.device, tiny=options.tiny or options.device != "cuda")


def smoke_entries(options: Options) -> Iterator[Entry]:
    """Every suite that runs anywhere, in a toy size."""
    tiny = dataclasses.replace(options, tiny=True, model=None, titles=None)
    for name in ("end_to_end", *LIBRARIES, "scale"):
        yield from suites()[name](tiny)


def broken(method: str, error: Exception) -> Case:
    """A case whose row says why the method could not be set up."""

    def run() -> None:
        raise error

    return Case(method, run, lambda _: None)


# ---- end to end ----------------------------------------------------------------------------------


def end_to_end_entries(options: Options) -> Iterator[Entry]:
    """Batch 1, 8, 32; prompts of about 600 tokens over 10,000 items (100,000 on a GPU)."""
    tiny = options.tiny
    batches = (1, 4) if tiny else end_to_end.BATCHES
    reasoning = (4, 33) if tiny else end_to_end.REASONING
    bench = functools.partial(_bench, options)
    yield from end_to_end.entries(bench, label=options.label, batches=batches, reasoning=reasoning)


@functools.lru_cache(maxsize=1)
def _bench(options: Options) -> end_to_end.Bench:
    work = make_workload(
        options.model,
        options.size,
        device=options.device,
        dtype=options.model_dtype,
        items=300 if options.tiny else 100_000 if options.device == "cuda" else 10_000,
        users=4 if options.tiny else max(end_to_end.BATCHES),
        prompt_tokens=280 if options.tiny else 600,
        titles=options.titles,
    )
    if options.model_dtype == torch.bfloat16:  # a sum over thirty layers
        return end_to_end.Bench(work, state_limit=5e-2, score_limit=5e-2, strays=0.2)
    return end_to_end.Bench(work)


def describe_end_to_end(options: Options) -> str:
    """What the end-to-end rows stand on: model, prompt and title lengths."""
    return _bench(options).work.describe()


# ---- item head -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _table(device: str, count: int, dim: int) -> torch.Tensor:
    items = item_head.vectors(count, dim, 0, None)
    return items.to(device, compute_dtype(device))


@functools.lru_cache(maxsize=8)
def _search(method: str, device: str, count: int, dim: int) -> item_head.Search:
    return item_head.METHODS[method](_table(device, count, dim))


def item_head_entries(options: Options) -> Iterator[Entry]:
    """Exact top-K beside torch, FAISS and usearch; B grows on one table, then another table."""
    if options.tiny:
        shapes = [(2000, 32, batch) for batch in (1, 4, 16)]
    elif options.device == "cuda":
        shapes = [(n, 256, b) for n in (1_000_000, 10_000_000) for b in (1, 16, 64, 1024)]
    else:
        shapes = [(n, d, b) for n, d in ((100_000, 576), (200_000, 1024)) for b in (1, 16, 64, 256)]
    methods = ("torch", "item_topk", "index none", "index auto", "faiss", "usearch")
    for count, dim, batch in shapes:
        shape = {"N": count, "d": dim, "B": batch, "k": K}
        build = functools.partial(_item_head_cases, methods, options.device, count, dim, batch)
        yield Entry("item_head", "top-K", shape, methods, build, versus="torch")


def _item_head_cases(
    methods: Sequence[str], device: str, count: int, dim: int, batch: int
) -> list[Case]:
    items = _table(device, count, dim)
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(batch, dim, generator=generator).to(items)
    checked = queries[:16]
    right = item_topk(checked, items, K, impl="reference").indices
    # the table is read once; one product
    moved, flops = float(items.nbytes), 2.0 * batch * count * dim

    def check(name: str, found: tuple) -> float:
        ids = found[1][: len(checked)].to(right.device)
        missed = 1 - float((ids[:, :, None] == right[:, None]).any(2).float().mean())
        ours = name == "item_topk" or name.startswith("index")
        if ours and not torch.equal(ids, right):
            raise Wrong("other items, or another order, than the reference implementation")
        return require(missed, 0.01, "share of the best items that it misses")

    made = []
    for name in methods:
        try:
            search = _search(name, device, count, dim)
        except Exception as error:  # a peer that is missing, or takes no such table
            made.append(broken(name, error))
            continue
        run = functools.partial(search, queries, K)
        own = name not in ("faiss", "usearch")
        check_it = functools.partial(check, name)
        made.append(Case(name, run, check_it, moved, flops, batch, "queries", own_memory=own))
    return made


# ---- losses and target statistics ----------------------------------------------------------------


def loss_entries(options: Options) -> Iterator[Entry]:
    """The RecPO token loss over growing vocabularies; exact rank and log-probability."""
    if options.tiny:
        shapes = [loss_peers.Shape(64, vocab, 32) for vocab in (500, 1000, 2000)]
        stats = [(2000, 32, 4)]
    elif options.device == "cuda":
        shapes = [loss_peers.Shape(4096, v, 1024) for v in (32_000, 49_152, 152_064, 256_000)]
        stats = [(1_000_000, 256, batch) for batch in (1, 64, 1024)]
    else:
        shapes = [loss_peers.Shape(512, v, 576) for v in (32_000, 49_152, 152_064, 256_000)]
        stats = [(100_000, 576, batch) for batch in (1, 16, 64, 256)]
    methods = tuple(name for name in loss_peers.PEERS if "CE" not in name and "cross" not in name)
    for shape in shapes:
        size = {"T": shape.tokens, "V": shape.vocab, "d": shape.width}
        build = functools.partial(_loss_cases, methods, options.device, shape)
        versus = "TRL chunked log-prob"
        yield Entry("losses", "token loss, frozen head", size, methods, build, versus=versus)
    for count, dim, batch in stats:
        size = {"N": count, "d": dim, "B": batch}
        build = functools.partial(_stats_cases, options.device, count, dim, batch)
        pair = ("target_stats", "materialised scores")
        yield Entry("losses", "rank and log-prob", size, pair, build, versus=pair[1])


def _loss_cases(methods: Sequence[str], device: str, shape: loss_peers.Shape) -> list[Case]:
    data = loss_peers.Data(shape, device, compute_dtype(device))
    rows = min(64, shape.tokens)
    right_loss, right_hidden = loss_peers.exact(data, rows)
    limit = 2e-2 if device == "cuda" else 1e-4
    # two products of T x V x d; the head is read once in each
    flops = 4.0 * shape.tokens * shape.vocab * shape.width
    moved = 2.0 * data.weight.nbytes

    def check(found: tuple[torch.Tensor, ...]) -> float:
        loss_error = abs(float(found[0]) - right_loss) / abs(right_loss)
        hidden_error = relative_error(found[1][:rows], right_hidden)
        return require(max(loss_error, hidden_error), limit, "loss and gradient")

    return [
        Case(
            name,
            functools.partial(loss_peers.step, data, loss_peers.PEERS[name]),
            check,
            moved,
            flops,
            shape.tokens,
            "tokens",
        )
        for name in methods
    ]


def _stats_cases(device: str, count: int, dim: int, batch: int) -> list[Case]:
    items = _table(device, count, dim)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, count, (batch,), generator=generator).to(device)
    queries = torch.randn(batch, dim, generator=generator).to(items) + 0.1 * items[targets]
    part = slice(0, 16)
    right = target_stats(queries[part], items, targets[part], impl="reference")

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        scores = (queries @ items.T).float()
        own = scores.gather(1, targets[:, None])
        return 1 + (scores > own).sum(1), own[:, 0] - scores.logsumexp(1)

    def check(found: tuple[torch.Tensor, torch.Tensor]) -> float:
        if not torch.equal(found[0][part], right.rank):
            raise Wrong("ranks differ from the reference implementation")
        error = float((found[1][part] - right.log_prob).abs().max())
        return require(error, 1e-3, "log-probability")

    moved, flops = float(items.nbytes), 2.0 * batch * count * dim
    numbers = (moved, flops, batch, "queries")
    return [
        Case("target_stats", lambda: target_stats(queries, items, targets), check, *numbers),
        # a rank by rounded scores may be off by a near-tie
        Case("materialised scores", plain, lambda _: None, *numbers),
    ]


# ---- packing -------------------------------------------------------------------------------------


def packing_entries(options: Options) -> Iterator[Entry]:
    """Packers of ragged rows into batches of 8192 tokens, on the CPU."""
    methods = ("r2ec_fast, 1 thread", "r2ec_fast, 2 threads", "TRL bfd", "numpy", "plain Python")
    methods += ("DataCollatorWithFlattening", "padded")
    for count in (200, 1000, 5000) if options.tiny else (1000, 10_000, 100_000):
        build = functools.partial(_packing_cases, count)
        yield Entry("packing", "pack", {"rows": count}, methods, build, versus="TRL bfd")


def _packing_cases(count: int) -> list[Case]:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.5, 0.7, count).astype(np.int64), 1, 2048)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = rng.integers(0, 49_152, offsets[-1], dtype=np.int32)

    def check(describe: Callable, out: object) -> None:
        _, tokens, _ = describe(out)
        if tokens != offsets[-1]:
            raise Wrong(f"{tokens} tokens came back of {offsets[-1]}")

    made, packers = [], packing.packers(values, offsets)
    while True:
        try:
            name, run, describe = next(packers)
        except StopIteration:
            return made
        except ModuleNotFoundError as error:
            return [*made, broken("TRL bfd", error)]
        check_it = functools.partial(check, describe)
        made.append(Case(name, run, check_it, work=float(offsets[-1]), unit="tokens"))


# ---- rollout -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _language_model(options: Options):
    dtype = options.model_dtype
    if options.model is None:
        texts = ["Analyze in depth and recommend the next product."]
        return random_model(options.size, dtype).to(options.device).eval(), small_tokenizer(texts)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    return model.to(options.device).eval(), AutoTokenizer.from_pretrained(options.model)


def rollout_entries(options: Options) -> Iterator[Entry]:
    """G samples of one prompt beside ``generate(num_return_sequences=G)``."""
    prompt, new = (40, 8) if options.tiny else (600, 32)
    for samples in (2, 4, 8):
        shape = {"P": prompt, "R": new, "G": samples}
        methods = ("shared", "plain", "generate")
        build = functools.partial(_rollout_cases, options, prompt, new, samples)
        op = f"samples, {options.label}"
        yield Entry("rollout", op, shape, methods, build, versus="generate")


def _rollout_cases(options: Options, prompt: int, new: int, samples: int) -> list[Case]:
    model, tokenizer = _language_model(options)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 500, (prompt,), generator=generator).tolist()
    limit = 5e-2 if options.model_dtype == torch.bfloat16 else 1e-3

    @torch.no_grad()
    def check(out) -> float:
        return require(rollout.log_prob_error(model, ids, out), limit, "log-probability")

    made = [
        Case(
            name,
            rollout.engine_run(model, tokenizer, ids, samples, new, name),
            check,
            work=float(samples * new),
            unit="tokens",
        )
        for name in ("shared", "plain")
    ]
    run = rollout.generate_run(model, ids, samples, new)
    length = prompt + new

    def whole(out: torch.Tensor) -> None:
        if out.shape != (samples, length):
            raise Wrong(f"expected {samples} rows of {length} tokens, got {list(out.shape)}")

    return [*made, Case("generate", run, whole, work=float(samples * new), unit="tokens")]


# ---- catalog scale -------------------------------------------------------------------------------


def scale_entries(options: Options) -> Iterator[Entry]:
    """Cost against the number of items: top-K by `item_topk` and `ItemIndex`, rank by
    `target_stats`; 64 columns (an ID-based model) and 576 (SmolLM2-135M)."""
    if options.tiny:
        tables = [(n, 16) for n in (1000, 2000, 4000)]
    else:
        tables = [(10**e, 64) for e in (4, 5, 6, 7)] + [(10**e, 576) for e in (4, 5, 6)]
    for count, dim in tables:
        for batch in (1, 16):
            shape = {"N": count, "d": dim, "B": batch}
            methods = ("item_topk", "index auto", "target_stats", "torch")
            build = functools.partial(_scale_cases, options.device, count, dim, batch)
            yield Entry("scale", "whole catalog", shape, methods, build, versus="torch")


@functools.lru_cache(maxsize=1)
def _index(device: str, count: int, dim: int) -> ItemIndex:
    return ItemIndex(_table(device, count, dim))


def _scale_cases(device: str, count: int, dim: int, batch: int) -> list[Case]:
    items = _table(device, count, dim)
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, count, (batch,), generator=generator).to(device)
    queries = torch.randn(batch, dim, generator=generator).to(items) + 0.1 * items[targets]
    index = _index(device, count, dim)
    moved, flops = float(items.nbytes), 2.0 * batch * count * dim
    numbers = (moved, flops, batch, "queries")
    best = item_topk(queries, items, K)  # a route of its own: checked against float64 below
    part = queries[:2]
    scores = torch.cat([part.double() @ block.double().T for block in items.split(1 << 20)], 1)
    order = scores.float().sort(dim=1, descending=True, stable=True).indices[:, :K]
    rank = 1 + (scores > scores.gather(1, targets[:2, None])).sum(1)
    del scores

    def check_top(found: tuple) -> None:
        if not torch.equal(found[1][:2], order) or not torch.equal(found[1], best.indices):
            raise Wrong("other items than float64 scores give")

    def check_rank(found: tuple) -> None:
        if not torch.equal(found[0][:2], rank):
            raise Wrong("ranks differ from float64")

    def plain() -> tuple:
        return tuple((queries @ items.T).topk(K, dim=1))

    return [
        Case("item_topk", lambda: item_topk(queries, items, K), check_top, *numbers),
        Case("index auto", lambda: index.search(queries, K), check_top, *numbers),
        Case("target_stats", lambda: index.target_stats(queries, targets), check_rank, *numbers),
        Case("torch", plain, lambda _: None, *numbers),
    ]
