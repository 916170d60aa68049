"""Every Triton kernel in every type, at small odd shapes, against the reference: no times.

Where there is no GPU the shapes are tiny, for Triton's interpreter, and the types those that it
multiplies rightly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from harness import Case, Entry, Wrong, require
from kernel_data import (
    Head,
    HeadShape,
    draw,
    name_of,
    require_equal,
    require_stats,
    tables,
)
from options import Options

from r2ec_kernels import ItemIndex, item_topk, reward_and_advantage, target_stats

SUITE, SECTION = "checks", "correctness"
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
INTERPRETED_DTYPES = (torch.float32, torch.float16)
EXCLUDED = 30  # ids a query
# temperatures that leave ranks and probabilities something to get wrong
TEMPERATURES = {"dot": 4.0, "cosine": 0.1, "l2": 4.0}


def entries(options: Options) -> Iterator[Entry]:
    """One entry an op, type and similarity; all ops of a type before the next type."""
    tiny = options.tiny or options.device == "cpu"
    check = functools.partial(_Tables, options.device, tiny)
    for dtype in INTERPRETED_DTYPES if tiny else DTYPES:
        for similarity in TEMPERATURES:
            yield from _both(check, dtype, similarity)
        for scan in ("int8", "bf16", "none"):
            yield _entry(f"ItemIndex.search {scan} of {name_of(dtype)}", _index, check, dtype, scan)
        for shape in _heads(tiny, dtype):
            build = functools.partial(_head, options.device, shape)
            yield Entry(SUITE, shape.label, shape.size, ("triton",), build, section=SECTION)
    groups = (7, 5) if tiny else (64, 8)
    build = functools.partial(_rewards, options.device, *groups)
    shape = dict(zip("BG", groups, strict=True))
    op = "reward_and_advantage float32"
    yield Entry(SUITE, op, shape, ("triton",), build, section=SECTION)


class _Tables:
    """Tables of one type: narrow and aligned, of odd width, and for a wide tile of queries."""

    def __init__(self, device: str, tiny: bool, dtype: torch.dtype) -> None:
        self.count, self.k = (700, 5) if tiny else (20_000, 20)
        self.sizes = ((1, 40), (5, 72)) if tiny else ((1, 64), (17, 72), (130, 128))
        self.parts = []
        for batch, dim in self.sizes:
            items, [queries] = tables(device, self.count, dim, batch, dtype, copies=1)
            excluded = draw(device, self.count, batch, EXCLUDED)
            targets = draw(device, self.count, batch, seed=2)
            self.parts.append((queries, items, excluded, targets))

    def case(self, run: Callable, right: Callable, compare: Callable) -> Case:
        """``run`` on every table, compared with what ``right`` gives."""

        def check(found: list) -> float:
            errors = [0.0]
            for size, ours, part in zip(self.sizes, found, self.parts, strict=True):
                try:
                    errors.append(compare(ours, right(*part)) or 0.0)
                except Wrong as error:
                    raise Wrong("B={} d={}: ".format(*size) + str(error)) from error
            return max(errors)

        runs = functools.partial(_each, run, self.parts)
        return Case("triton", runs, check, timed=False)


def _each(run: Callable, parts: Iterable[tuple]) -> list:
    return [run(*part) for part in parts]


def _entry(op: str, build: Callable, make: Callable, dtype: torch.dtype, how: str) -> Entry:
    return Entry(SUITE, op, {}, ("triton",), lambda: [build(make(dtype), how)], section=SECTION)


def _both(make: Callable, dtype: torch.dtype, similarity: str) -> Iterator[Entry]:
    yield _entry(f"item_topk {similarity} {name_of(dtype)}", _topk, make, dtype, similarity)
    yield _entry(f"target_stats {similarity} {name_of(dtype)}", _stats, make, dtype, similarity)


def _topk(data: _Tables, similarity: str) -> Case:
    def run(queries, items, excluded, targets, impl="triton") -> tuple:
        how = {"similarity": similarity, "temperature": 0.5, "exclude": excluded}
        return item_topk(queries, items, data.k, impl=impl, **how)

    return data.case(run, functools.partial(run, impl="reference"), require_equal)


def _stats(data: _Tables, similarity: str) -> Case:
    def run(queries, items, excluded, targets, impl="triton") -> tuple:
        how = {"similarity": similarity, "temperature": TEMPERATURES[similarity]}
        return target_stats(queries, items, targets, exclude=excluded, impl=impl, **how)

    reference = functools.partial(run, impl="reference")
    return data.case(run, reference, lambda found, right: require_stats(found, *right))


def _index(data: _Tables, scan: str) -> Case:
    indices = {id(items): ItemIndex(items, scan=scan) for _, items, _, _ in data.parts}

    def run(queries, items, excluded, targets) -> tuple:
        return indices[id(items)].search(queries, data.k, exclude=excluded)

    def reference(queries, items, excluded, targets) -> tuple:
        return item_topk(queries, items, data.k, exclude=excluded, impl="reference")

    case = data.case(run, reference, require_equal)
    case.remark = lambda: ", ".join(scanned_by(index) for index in indices.values())
    return case


def scanned_by(index: ItemIndex) -> str:
    """What the last search of an index did: "int8, 3 of 16 dense"."""
    stats = index.last_search
    return f"{stats.scan}, {stats.dense_rows} of {stats.queries} dense"


def _heads(tiny: bool, dtype: torch.dtype) -> Iterator[HeadShape]:
    tokens, vocab = (20, 300) if tiny else (300, 5001)
    wide = 136 if tiny else 200  # a narrow head has a kernel of its own
    plain = functools.partial(HeadShape, tokens, vocab, dtype=dtype)
    yield plain(wide)
    yield plain(64)
    yield plain(wide, frozen=False)
    yield plain(wide, softcap=30.0)
    yield plain(128, softcap=30.0)
    yield plain(wide, frozen=False, extras=True)


def _head(device: str, shape: HeadShape) -> list[Case]:
    head = Head(device, shape)
    return [Case("triton", head.run_triton, head.check, timed=False)]


def _rewards(device: str, groups: int, size: int) -> list[Case]:
    rank = 1 + draw(device, 1500, groups, size)
    log_prob = -5e-3 * draw(device, 1000, groups, size, seed=2)

    call = functools.partial(reward_and_advantage, rank, log_prob, impl="triton")
    return [rewards_case("triton", call, rank, log_prob, timed=False)]


def rewards_case(
    method: str, run: Callable, rank: torch.Tensor, log_prob: torch.Tensor, **numbers
) -> Case:
    """A case whose advantages are compared with float64."""

    def check(found: tuple) -> float:
        right = reward_and_advantage(rank, log_prob.double(), impl="torch")
        if not torch.equal(found[2], right[2]):
            raise Wrong("another best one of a group than float64 gives")
        return require(float((found[1] - right[1]).abs().max()), 1e-4, "advantage")

    return Case(method, run, check, **numbers)
