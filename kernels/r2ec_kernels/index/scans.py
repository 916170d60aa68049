"""Which coarse scans a call on an index runs.

A search may use any product of any copy, because its result is exact whatever it used: the fastest
way, as measured (``autoselect``), with the rows themselves behind it. Log-probabilities depend on
the scan by its rounding, so the scan of ``target_stats`` follows from the numbers alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from .._cpu import extension
from .._exact.bounds import Queries, prepare_queries
from .._exact.table import Table
from .._scan.blocks import GROUP, CoarseScan
from .._scan.float32 import Float32Scan, block_rows
from ..rank.impl.common import raw_per_score
from ..rank.impl.torch import RankScan, row_scans
from ..topk.impl.common import SearchStats
from . import fbgemm, fine
from .autoselect import Trials, batch_class, seconds_per_row
from .code_scan import CodeScan
from .products import PRODUCTS, Product, has_bf16_tiles, measured_run
from .storage import Storage

SCANS = ("auto", "none", "fp16", "bf16", "int8")
_PACKED_SCORES, _PACKED_ROWS = 1 << 20, 1 << 16  # of a block of packed codes
_UNFIT_SHARE = 1 / 8  # of a search's queries
_BOOKKEEPING = 2e-4  # seconds of a certified search around its products, and of no row search
_RESCORING = 1.2e-9  # seconds for a column of a row that is kept and rescored, on one core
_LOG_PROB_ERROR = 1e-3  # of target_stats: two standard deviations of a single score

_Way = tuple[str, Product[Any, Any] | None]  # a copy and its product; ("none", None): the rows


def copy_kinds(scan: str, device: torch.device) -> tuple[str, ...]:
    """The low-precision copies of an index."""
    packs = fbgemm.available(device)
    if scan == "fp16" and not packs:
        raise ValueError(
            f"scan: 'fp16' needs a CPU whose torch has FBGEMM (x86), got device {device}; "
            "'bf16' runs everywhere"
        )
    if scan == "auto":
        if device.type == "cuda":  # int8 codes list most rows of a language model's states
            return ("bf16",)
        many = ("bf16",) if has_bf16_tiles(device) else ("fp16",) if packs else ()
        few = ("int8",) if extension.available(device) or not many else ()
        return many + few
    return () if scan == "none" else (scan,)


class Choice(NamedTuple):
    """How a search is made: the product's name; whether ``row_search`` makes it; and what is to be
    told the seconds it took."""

    product: str
    by_rows: bool
    took: Callable[[float], None]


class ScanChoice:
    """The scans of one index's ``storage`` under its setting ``scan``."""

    def __init__(self, scan: str, storage: Storage) -> None:
        self.scan, self._storage = scan, storage
        self._kinds = storage.kinds  # to search with; the storage may keep a "fine" copy beside
        self._unfit: frozenset[str] = frozenset()  # products whose bounds are too wide for the rows
        self._candidates: dict[str, float] = {}  # of a result, by product, as searches found them
        self._row_searches = self._row_failures = 0  # asked for, and those that could not tell
        self._trials = Trials()

    def choose(self, queries: torch.Tensor, k: int, temperature: float, rows: bool) -> "Choice":
        """How to search all of the storage, which has rows, for k of them; rows: whether
        ``row_search``, which spares a certified search's bookkeeping, may be asked."""
        often_fails = self._row_failures > max(_UNFIT_SHARE * self._row_searches, 2)
        rows = rows and not often_fails and self.scan in ("auto", "none")
        batch, size = batch_class(len(queries)), self._storage.size.bit_length()
        kind = size, batch, batch_class(k), rows, queries.dtype, _machine(), self._unfit

        def foreseen() -> dict[str, float]:
            query = prepare_queries(queries, self._storage.similarity, temperature)
            seconds = self._seconds(self._products(len(queries)), query, k)
            around = _BOOKKEEPING if rows else 0.0
            return {name: of + around * (name != "float32") for name, of in seconds.items()}

        name = self._trials.choose(kind, foreseen)
        return Choice(name, rows and name == "float32", partial(self._trials.took, kind, name))

    def of_search(
        self, query: Queries, table: Table, k: int, chosen: str | None = None
    ) -> tuple[str, list[Callable[[Queries], CoarseScan]]]:
        """The name of the product to scan with, and the scans of a search of ``table`` for k rows:
        the storage's, or one that was gathered of it, whose rows are scanned themselves. chosen:
        the product, if that is known."""
        storage = self._storage
        if not self._is_whole(table):
            return "float32", [partial(Float32Scan, table.rows, None)]
        if not storage.size or not len(query.scaled):
            return "none", []
        kind, product = self._product(query, k, chosen)
        rows = partial(Float32Scan, storage.live("rows"), storage.live("norm"))
        if product is None:
            return "float32", [rows]

        def codes(query: Queries) -> CoarseScan:
            return self._code_scan(query, kind, product, _PACKED_ROWS)

        return product.name, [codes, rows]

    def searched_rows(self, could_tell: bool) -> None:
        """Remember whether a search of the rows alone gave the results."""
        self._row_searches += 1
        self._row_failures += not could_tell

    def observe(self, name: str, stats: SearchStats) -> None:
        """Remember how many rows a product left to rescore, and take one out of the choice that
        left many of a search's queries to another scan."""
        if stats.dense_rows < stats.queries and not stats.scanned_again:
            self._candidates[name] = stats.candidates_per_k
        if self.scan == "auto" and stats.scanned_again > stats.queries * _UNFIT_SHARE:
            self._unfit |= {name}

    def of_stats(self, query: Queries, table: Table, use_scan: bool) -> list[RankScan]:
        """Scans for log-probabilities: chosen by the numbers, never by a measured time, so that one
        input gives one result."""
        storage = self._storage
        if not self._is_whole(table):
            return row_scans(table.rows, None, len(query.scaled))
        scans = row_scans(storage.live("rows"), storage.live("norm"), len(query.scaled))
        if not use_scan or not storage.size or not len(query.scaled):
            return scans
        make: RankScan
        if fine.KIND in storage.kinds:
            copy, limits = storage.fine_copy(), storage.limits(fine.KIND)
            make = partial(fine.FineScan, copy, limits, storage.mean)
            typical = fine.FineScan(copy, limits, storage.mean, query).typical
        elif "fp16" in self._kinds:
            [product] = PRODUCTS["fp16"]

            def make(query: Queries) -> CoarseScan:
                return self._code_scan(query, "fp16", product, _PACKED_ROWS // 4)

            typical = self._code_scan(query, "fp16", product, _PACKED_ROWS // 4).typical
        else:
            return scans
        # A log-probability is off by a mean of the scores' errors; the target's own has none.
        if bool((typical <= _LOG_PROB_ERROR / 2 * raw_per_score(query)).all()):
            scans.insert(0, make)
        return scans

    def wants_fine_copy(self) -> bool:
        """Whether ranks are to be read from a "fine" copy that is not kept yet."""
        storage = self._storage
        serves = storage.device.type == "cpu" and extension.has_amx()
        serves = serves and storage.similarity != "l2" and "int8" in self._kinds
        return serves and self.scan == "auto" and fine.KIND not in storage.kinds

    def device_kind(self) -> str | None:
        """The copy that a GPU scans; None: the rows themselves."""
        return next((kind for kind in self._kinds if kind != "fp16"), None)  # packed for CPUs only

    def _is_whole(self, table: Table) -> bool:
        """Whether it is the storage's; a table gathered of as many rows has them in their order."""
        return len(table) == self._storage.size

    def _code_scan(
        self, query: Queries, kind: str, product: Product[Any, Any], packed_rows: int
    ) -> CodeScan[Any]:
        """packed_rows: of a block of packed codes, at most."""
        batch, storage = query.scaled.shape[0], self._storage
        if product.block == GROUP and not extension.available(storage.device):
            height = block_rows(storage.width, batch, storage.device)
        else:  # nothing but scores to keep in a cache
            height = min(_PACKED_SCORES // batch, packed_rows)
        return CodeScan(
            storage.copy(kind), storage.limits(kind), storage.mean, product, query, height
        )

    def _product(self, query: Queries, k: int, chosen: str | None) -> _Way:
        """The copy and the product a search of this batch for k rows scans."""
        products = self._products(query.scaled.shape[0])
        if chosen in products:
            return products[chosen]
        seconds = self._seconds(products, query, k)
        return products[min(seconds, key=seconds.__getitem__)]

    def _products(self, batch: int) -> dict[str, _Way]:
        """The products that a search of ``batch`` queries can use, by name."""
        found: dict[str, _Way] = {}
        for kind in self._kinds:
            codes = self._storage.codes(kind)
            for product in PRODUCTS[kind]:
                if product.supports(codes, batch) and product.name not in self._unfit:
                    found[product.name] = (kind, product)
        if self.scan in ("auto", "none"):
            found["float32"] = ("none", None)
        return found

    def _seconds(self, products: dict[str, _Way], query: Queries, k: int) -> dict[str, float]:
        """What the products of a search and the scores of its candidates take, without those
        products that are far too slow."""
        storage, batch = self._storage, query.scaled.shape[0]
        runs: dict[str, Callable[[], Callable[[int], int]]] = {}
        for name, (kind, product) in products.items():
            if product is None:
                runs[name] = partial(_measured_rows, storage.live("rows"), query)
            else:
                runs[name] = partial(measured_run, product, storage.codes(kind), query)
        dtype, width = storage.fields["rows"].dtype, storage.width
        key = (self.scan, dtype, storage.device, width, batch_class(batch), _machine(), self._unfit)
        pair = _RESCORING * width / torch.get_num_threads()
        seconds = {}
        for name, of_row in seconds_per_row(key, runs, storage.size, 4 * width).items():
            product = products[name][1]
            usual = 1.0 if product is None else product.candidates
            candidates = self._candidates.get(name, usual) * batch * min(k, storage.size)
            seconds[name] = of_row * storage.size + pair * candidates
        return seconds


def _machine() -> tuple[str | None, int]:
    """What a measurement depends on beside its arguments."""
    return extension.cpu_kind(), torch.get_num_threads()


def _measured_rows(rows: torch.Tensor, query: Queries) -> Callable[[int], int]:
    """As ``products.measured_run``, for the float32 product of the rows themselves."""
    batch = len(query.scaled)
    if extension.fits(rows, batch):

        def run(count: int) -> int:
            nothing = torch.empty(0, dtype=torch.int64)
            extension.Collector(batch, 1, batch, nothing).add_rows(rows[:count], query)
            return min(count, len(rows))

        return run
    operand = query.scaled.T.contiguous()
    return lambda count: len(torch.mm(rows[:count].float(), operand))
