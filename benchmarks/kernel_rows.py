"""The Triton kernels at work on large inputs: checked against float64, then timed.

An operation has one builder; the profile and the CUDA graphs are further views of its cases. With
``tiny`` sizes the kernels run in Triton's interpreter, in float32, which multiplies bfloat16
wrongly.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
from harness import Case, Entry, Wrong, rotating
from kernel_checks import rewards_case, scanned_by
from kernel_data import (
    COPIES,
    QUERIES,
    Head,
    HeadShape,
    draw,
    exact_scores,
    exact_stats,
    name_of,
    require_best,
    require_stats,
    tables,
)
from options import Options
from views import profiled, replayed

from r2ec_kernels import ItemIndex, item_topk, reward_and_advantage, target_stats

SUITE = "kernels"
K = 10
WIDTHS, BATCHES = (1024, 128, 2304, 576), (16, 1024, 1, 64)


def entries(options: Options) -> Iterator[Entry]:
    """One entry an operation and shape."""
    tiny = options.tiny or options.device == "cpu"
    make = _Builders(options.device, torch.float32 if tiny else torch.bfloat16)
    if tiny:
        yield from make.all(700, [(40, 3), (40, 5)], wide=136, tokens=20, vocab=500, groups=7)
    else:
        grid = list(itertools.product(WIDTHS, BATCHES))
        yield from make.all(10**6, grid, wide=1024, tokens=4096, vocab=152_064, groups=4096)


class _Builders:
    """Entries on one device, tables and heads in ``half`` where nothing else is said."""

    def __init__(self, device: str, half: torch.dtype) -> None:
        self.device, self.half = device, half

    def all(
        self,
        count: int,
        grid: Sequence[tuple[int, int]],
        *,
        wide: int,
        tokens: int,
        vocab: int,
        groups: int,
    ) -> Iterator[Entry]:
        """N items; the item head's widths and batches; a wide head of T tokens and V words."""
        few, many = min(16, grid[0][1]), min(64, max(batch for _, batch in grid))
        for dim, batch in grid:
            yield self.topk(count, dim, batch, self.half)
        yield self.topk(count, wide, many, self.half, excluded=20)
        yield self.topk(count, wide, many, torch.float32)
        for batch in sorted({few, many, *(batch for dim, batch in grid if dim == wide)}):
            yield self.stats(count, wide, batch)
        yield self.index(count, wide, few, "int8")
        yield self.index(count, wide, few, "bf16")
        yield self.index(count, wide, many, "int8")
        head = functools.partial(HeadShape, tokens, vocab, dtype=self.half)
        yield self.head(head(wide))
        yield self.head(HeadShape(min(tokens, 256), count, 64, self.half))
        yield self.head(head(wide, frozen=False))
        yield self.head(head(wide, softcap=30.0))
        yield self.rewards(groups, 8)
        yield profiled(self.topk(count, wide, few, self.half), "call")
        yield profiled(self.topk(count, wide, many, self.half), "call")
        yield profiled(self.stats(count, wide, few), "triton")
        yield profiled(self.index(count, wide, few, "int8"), "triton")
        yield profiled(self.head(head(wide)), "triton")
        for batch in sorted({1, few, many}):
            yield replayed(self.topk(count, wide, batch, self.half, copies=1), "call")

    def topk(
        self,
        count: int,
        dim: int,
        batch: int,
        dtype: torch.dtype,
        excluded: int = 0,
        copies: int = COPIES,
    ) -> Entry:
        """``kernel``: the scan alone; ``call``: the whole call; ``cuBLAS``: the bare product."""
        shape = {"N": count, "d": dim, "B": batch, "k": K, "excluded": excluded}
        device = self.device

        def build() -> list[Case]:
            items, queries = tables(device, count, dim, batch, dtype, copies)
            exclude = draw(device, count, batch, excluded) if excluded else None

            def call(q: torch.Tensor) -> tuple:
                return item_topk(q, items, K, exclude=exclude, impl="triton")

            def plain(q: torch.Tensor) -> tuple:
                scores = q @ items.T
                if exclude is not None:
                    scores.scatter_(1, exclude, -torch.inf)
                return scores.topk(K, dim=1)

            def exact(found: tuple) -> float:
                scores = exact_scores(queries[0][:QUERIES], items)
                if exclude is not None:
                    scores.scatter_(1, exclude[:QUERIES], -torch.inf)
                require_best(found, scores, K)
                return 0.0

            scan = _ScanAlone(queries, items)
            product = rotating(lambda q: q @ items.T, queries)
            case = functools.partial(Case, **_numbers(items, batch))
            return [
                case("kernel", scan, scan.check, prepare=scan.prepare),
                case("call", rotating(call, queries), exact),
                case("torch", rotating(plain, queries), lambda _: None),
                case("cuBLAS", product, lambda _: None),
            ]

        # neither the kernel alone nor the product is given exclusions
        methods = ("call", "torch") if excluded else ("kernel", "call", "torch", "cuBLAS")
        return self._entry(f"item_topk {name_of(dtype)}", shape, methods, build, "item head")

    def index(self, count: int, dim: int, batch: int, scan: str) -> Entry:
        shape = {"N": count, "d": dim, "B": batch, "k": K}
        device = self.device

        def build() -> list[Case]:
            items, queries = tables(device, count, dim, batch, torch.float32)
            index = ItemIndex(items, scan=scan)

            def exact(found: tuple) -> float:
                require_best(found, exact_scores(queries[0][:QUERIES], items), K)
                return 0.0

            numbers = _numbers(items, batch)
            scanned = numbers | {"moved": count * dim * (1.0 if scan == "int8" else 2.0)}
            search = rotating(lambda q: index.search(q, K), queries)
            plain = rotating(lambda q: (q @ items.T).topk(K, dim=1), queries)
            return [
                Case("triton", search, exact, remark=lambda: scanned_by(index), **scanned),
                Case("torch", plain, lambda _: None, **numbers),
            ]

        op = f"ItemIndex.search {scan} of float32"
        return self._entry(op, shape, ("triton", "torch"), build, "index")

    def stats(self, count: int, dim: int, batch: int) -> Entry:
        shape = {"N": count, "d": dim, "B": batch}
        device, dtype, temperature = self.device, self.half, 4.0

        def build() -> list[Case]:
            items, queries = tables(device, count, dim, batch, dtype)
            targets = draw(device, count, batch, seed=2)

            def triton(q: torch.Tensor) -> tuple:
                return target_stats(q, items, targets, temperature=temperature, impl="triton")

            def plain(q: torch.Tensor) -> tuple:
                scores = (q @ items.T).float() / temperature
                own = scores.gather(1, targets[:, None])
                return 1 + (scores > own).sum(1), own[:, 0] - scores.logsumexp(1)

            def exact(found: tuple) -> float:
                scores = exact_scores(queries[0][:QUERIES], items, temperature)
                return require_stats(found, *exact_stats(scores, targets[:QUERIES]))

            case = functools.partial(Case, **_numbers(items, batch))
            return [
                case("triton", rotating(triton, queries), exact),
                case("torch", rotating(plain, queries), lambda _: None),
            ]

        op = f"target_stats {name_of(dtype)}"
        return self._entry(op, shape, ("triton", "torch"), build, "ranks")

    def head(self, shape: HeadShape) -> Entry:
        # frozen: two products; trainable: logits once more and two gradients
        products = 2 if shape.frozen else 4
        elements = shape.vocab * shape.dim
        numbers = {
            "moved": float(products * elements * shape.dtype.itemsize),  # the head once a product
            "flops": products * 2.0 * shape.tokens * elements,
            "work": shape.tokens,
            "unit": "tokens",
        }
        device = self.device

        def build() -> list[Case]:
            head = Head(device, shape)
            return [
                Case("triton", head.run_triton, head.check, **numbers),
                Case("torch", head.run_plain, lambda _: None, **numbers),
            ]

        return self._entry(shape.label, shape.size, ("triton", "torch"), build, "loss")

    def rewards(self, groups: int, size: int) -> Entry:
        moved = float(
            groups * size * (8 + 4 + 4 + 4 + 1)
        )  # rank, log_prob; reward, advantage, best
        numbers = {"moved": moved, "work": groups, "unit": "users"}
        device = self.device

        def build() -> list[Case]:
            rank = 1 + draw(device, 1500, groups, size)
            log_prob = -5e-3 * draw(device, 1000, groups, size, seed=2)
            return [
                rewards_case(
                    impl,
                    functools.partial(reward_and_advantage, rank, log_prob, impl=impl),
                    rank,
                    log_prob,
                    **numbers,
                )
                for impl in ("triton", "torch")
            ]

        op, shape = "reward_and_advantage float32", {"B": groups, "G": size}
        return self._entry(op, shape, ("triton", "torch"), build, "loss")

    def _entry(self, op: str, shape: dict, methods: tuple[str, ...], build, section: str) -> Entry:
        return Entry(SUITE, op, shape, methods, build, versus="torch", section=section)


def _numbers(items: torch.Tensor, batch: int) -> dict[str, object]:
    """Of a pass over a table: it is read once; one product."""
    flops = 2.0 * batch * items.numel()
    return {"moved": float(items.nbytes), "flops": flops, "work": batch, "unit": "queries"}


class _ScanAlone:
    """The search kernel by itself, without what prepares it and what makes its result exact.

    It is private: this is the one place that knows how it is launched.
    """

    def __init__(self, queries: Sequence[torch.Tensor], items: torch.Tensor) -> None:
        self.queries, self.items = queries, items

    def prepare(self) -> None:
        from r2ec_kernels._scan.triton_queries import prepare_on_device
        from r2ec_kernels.topk.impl import triton_groups as kernels
        from r2ec_kernels.topk.impl.triton_scan import group_best

        self.group = kernels.group_size(len(self.items), K)
        scanned = kernels.scan_rows(self.items, "dot")
        self.unit = kernels.product_unit(scanned.codes, self.items.shape[1])
        dtype = kernels.operand_type(scanned.codes)
        self.prepared = [prepare_on_device(q, "dot", 1.0, dtype) for q in self.queries]
        self.run = rotating(
            lambda query: group_best(scanned, query.operand, self.group, None, None),
            self.prepared,
        )

    def __call__(self) -> tuple:
        return self.run()

    def check(self, found: tuple) -> None:
        """The best score of each query is within the kernel's own bound."""
        query, queries = self.prepared[0], self.queries[0][:QUERIES].double()
        scale = torch.exp2(-torch.linalg.vector_norm(queries, dim=1).log2().floor())
        best = exact_scores(self.queries[0][:QUERIES], self.items).amax(1) * scale
        bits = found[0][:QUERIES].amax(1) & -self.group
        ours = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
        norm, _, missed, floor = query.bounds[:, :QUERIES]
        high = 1.001 * torch.linalg.vector_norm(self.items, dim=1, dtype=torch.float32).max()
        error = high * ((query.unit + 1.02 * self.unit) * norm + 1.02 * missed) + floor
        if not bool(((ours - best).abs() <= error).all()):
            raise Wrong("the best score of a query is off by more than the kernel's bound")
