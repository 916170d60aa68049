"""The suites by name. Listing builds nothing; peers are imported where their rows are built."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import end_to_end
import gpu_rows
import item_head
import numpy as np
import packing
import torch
from harness import Case, Entry, Wrong, require
from options import Options
from workload import make_workload

from r2ec_kernels import ItemIndex, item_topk

LIBRARIES = ("item_head", "losses", "packing", "rollout")
K = 10


def suites() -> dict[str, Callable[[Options], Iterator[Entry]]]:
    """Name -> entries of a suite."""
    return {
        "end_to_end": end_to_end_entries,
        "item_head": item_head_entries,
        "packing": packing_entries,
        "scale": scale_entries,
        "smoke": smoke_entries,
        **gpu_rows.SUITES,
    }


def all_entries(names: Sequence[str], options: Options) -> list[Entry]:
    """The entries of the named suites. ValueError names an unknown one."""
    known = suites()
    for name in names:
        if name not in known:
            raise ValueError(f"suite: expected one of {', '.join(known)}, got {name!r}")
    return [entry for name in names for entry in known[name](options)]


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


@functools.lru_cache(maxsize=8)
def _search(method: str, device: str, count: int, dim: int) -> item_head.Search:
    return item_head.METHODS[method](item_head.table(device, count, dim))


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
    items = item_head.table(device, count, dim)
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
    return ItemIndex(item_head.table(device, count, dim))


def _scale_cases(device: str, count: int, dim: int, batch: int) -> list[Case]:
    items = item_head.table(device, count, dim)
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
