"""ItemIndex: a table prepared for searching, that can be written while it is searched."""

import os

import torch

from .. import _dispatch
from .._checks import check_scoring, check_vectors, one_of
from .._exact.bounds import Queries, prepare_queries
from .._exact.excluded import Exclude, ExcludedPairs, normalize_exclude
from .._exact.table import Table
from ..rank.api import TargetStats
from ..rank.impl.torch import certified_stats
from ..topk.api import TopK, check_search
from ..topk.impl.common import SearchStats, certified_topk
from . import files
from .locks import SharedLock
from .scans import SCANS, ScanChoice, copy_kinds
from .storage import Storage

_IMPLEMENTATIONS = frozenset({"torch", "triton"})


class ItemIndex:
    """Exact top-K search over item vectors that are added, overwritten and removed in place.

    ``search`` equals ``item_topk`` over the stored rows, bit for bit, whatever ``scan`` is. A
    low-precision scan multiplies a small copy of the table first and certifies which rows can
    matter (docs/kernels/search.md); it changes time and memory only.

    Searches may run in several threads at once. A write, append or removal waits for running
    searches and is seen whole or not at all.

    Args:
        items: [N, d], float32, bfloat16 or float16, finite; N may be 0. The rows are copied.
        similarity: "dot", "cosine" or "l2" (minus the unsquared distance).
        temperature: positive.
        scan: "none" multiplies the rows themselves; "fp16" (CPUs with FBGEMM), "bf16" and "int8" a
            copy of half or a quarter of a float32 table's size; "auto" keeps, on CPUs, the bf16
            copy where there are AMX tiles, else the fp16 copy, and the int8 copy for few queries
            (where the compiled scans are installed, or there is no FBGEMM); on GPUs the
            int8 copy. It takes, batch size by batch size, the product it measured to be fastest.

    Raises:
        TypeError, ValueError: wrong type, shape, range, or a value that is not finite.
    """

    def __init__(
        self,
        items: torch.Tensor,
        *,
        similarity: str = "dot",
        temperature: float = 1.0,
        scan: str = "auto",
    ) -> None:
        check_vectors("items", items)
        check_scoring(similarity, temperature)
        one_of("scan", scan, SCANS)
        self.similarity, self.temperature, self.scan = similarity, float(temperature), scan
        self._lock = SharedLock()
        self._last_search: SearchStats | None = None
        self._storage = Storage(similarity, copy_kinds(scan, items.device))
        self._storage.build(_finite("items", items.detach()))
        self._scans = ScanChoice(scan, self._storage)

    def __len__(self) -> int:
        """Live rows."""
        return self._storage.size

    @property
    def dim(self) -> int:
        """d."""
        return self._storage.width

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored rows."""
        return self._storage.fields["rows"].dtype

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._storage.device

    @property
    def ids(self) -> torch.Tensor:
        """int64 [len(index)]: the live ids, ascending."""
        with self._lock.shared():
            return (self._storage.place >= 0).nonzero()[:, 0]

    @property
    def items(self) -> torch.Tensor:
        """A copy of the rows by id, [highest id + 1, d]; the rows of removed ids are zero."""
        with self._lock.shared():
            storage = self._storage
            table = torch.zeros(
                storage.place.numel(), self.dim, dtype=self.dtype, device=self.device
            )
            table[storage.live("ids")] = storage.live("rows")
            return table

    @property
    def last_search(self) -> SearchStats | None:
        """Statistics of the search that finished last in any thread; None before the first."""
        return self._last_search

    def search(self, queries: torch.Tensor, k: int, *, exclude: Exclude = None) -> TopK:
        """The k best live items for each query: ``item_topk`` over the stored rows.

        Args:
            queries: [B, d].
            k: at least 0; more than ``len(self)`` is padded with (-inf, -1).
            exclude: ids that are not returned, padded int64 [B, L] or (values, offsets);
                removed ids are allowed.
        """
        check_search(k, self.similarity, self.temperature)
        queries = self._checked_queries(queries)
        with self._lock.shared():
            query = prepare_queries(queries, self.similarity, self.temperature)
            excluded = self._excluded(exclude, queries)
            name = _dispatch.resolve("auto", self.device, "ItemIndex.search", _IMPLEMENTATIONS)
            if name == "triton":
                scores, ids, stats = self._search_triton(query, k, excluded)
            else:
                product, scans = self._scans.of_search(query)
                scores, ids, stats = certified_topk(self._view(), scans, query, k, excluded)
                self._scans.observe(product, stats)
        self._last_search = stats
        return TopK(scores, ids)

    def target_stats(
        self,
        queries: torch.Tensor,
        targets: torch.Tensor,
        *,
        exclude: Exclude = None,
        use_scan: bool = True,
    ) -> TargetStats:
        """Exact rank (from 1) and log-probability of each query's target among the live items.

        An fp16 copy, or, where AMX tiles multiply int8, one of two int8 numbers a column, serves
        where its rounding errors are expected to move a log-probability by less than 1e-3, the rows
        themselves elsewhere; ranks are exact always. The first call builds the second kind of copy
        (``scan="auto"``, a quarter of a float32 table's size).

        Args:
            queries: [B, d].
            targets: int64 [B], live ids; a target competes even where it is excluded.
            exclude: as for ``search``.
            use_scan: False always reads the rows themselves: a log-probability then does not depend
                on the queries beside it by more than float32's rounding, which training wants.
        """
        queries = self._checked_queries(queries)
        if targets.shape != queries.shape[:1]:
            raise ValueError(
                f"targets: expected shape [{queries.shape[0]}], got {list(targets.shape)}"
            )
        if use_scan and self._scans.wants_fine_copy():
            with self._lock.alone():
                self._storage.keep_fine()
        with self._lock.shared():
            rows = self._storage.place[self._live_ids("targets", targets)]
            query = prepare_queries(queries, self.similarity, self.temperature)
            excluded = self._excluded(exclude, queries)
            rank, log_prob = certified_stats(
                self._view(),
                self._scans.of_stats(query, use_scan),
                query,
                rows,
                excluded,
            )
        return TargetStats(rank, log_prob)

    def write(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Overwrite the rows [n, d] of live ids int64 [n]; of a repeated id the last row counts.

        Costs O(n d).
        """
        rows = self._checked_rows(rows)
        with self._lock.alone():
            ids = self._live_ids("ids", ids)
            if ids.shape[0] != rows.shape[0]:
                raise ValueError(
                    f"ids: expected one for each of {rows.shape[0]} rows, got {ids.shape[0]}"
                )
            order = torch.argsort(ids, stable=True)
            ordered = ids[order]
            last = torch.ones_like(ordered, dtype=torch.bool)
            last[:-1] = ordered[1:] != ordered[:-1]
            self._storage.write(ordered[last], rows[order[last]])

    def append(self, rows: torch.Tensor) -> torch.Tensor:
        """Add rows [n, d]; returns their ids int64 [n], which were never used before."""
        rows = self._checked_rows(rows)
        with self._lock.alone():
            return self._storage.append(rows)

    def remove(self, ids: torch.Tensor) -> None:
        """Remove live, distinct ids int64 [n]; they are never used again."""
        with self._lock.alone():
            ids = self._live_ids("ids", ids)
            if ids.unique().numel() != ids.numel():
                raise ValueError("ids: expected distinct ids, got repeats")
            self._storage.remove(ids)

    def save(self, path: str | os.PathLike) -> None:
        """Write the live rows, their ids and the settings to one safetensors file."""
        with self._lock.shared():
            order = torch.argsort(self._storage.live("ids"))
            tensors = {
                "ids": self._storage.live("ids")[order],
                "rows": self._storage.live("rows")[order],
            }
            settings = {
                "similarity": self.similarity,
                "temperature": repr(self.temperature),
                "scan": self.scan,
                "next_id": str(self._storage.place.numel()),
            }
            files.write_tensors(path, tensors, settings)

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: str | torch.device = "cpu") -> "ItemIndex":
        """Read an index that ``save`` wrote.

        Raises:
            ValueError: the file is truncated, changed, or not an index.
        """
        tensors, settings = files.read_tensors(path)
        wanted = {"similarity", "temperature", "scan", "next_id"}
        if not wanted <= settings.keys() or tensors.keys() != {"ids", "rows"}:
            raise ValueError(f"{path}: expected an ItemIndex, found {sorted(tensors)}")
        ids, rows = tensors["ids"].to(device), tensors["rows"].to(device)
        index = cls(
            rows,
            similarity=settings["similarity"],
            temperature=float(settings["temperature"]),
            scan=settings["scan"],
        )
        index._storage.rename(ids, int(settings["next_id"]))
        return index

    def _checked_queries(self, queries: torch.Tensor) -> torch.Tensor:
        check_vectors("queries", queries, d=self.dim, device=self.device)
        queries = queries.detach()
        return _finite("queries", queries) if _dispatch.checks_enabled() else queries

    def _checked_rows(self, rows: torch.Tensor) -> torch.Tensor:
        check_vectors("rows", rows, d=self.dim, device=self.device)
        if rows.dtype != self.dtype:
            raise TypeError(f"rows: expected {self.dtype} like the index, got {rows.dtype}")
        return _finite("rows", rows.detach())

    def _live_ids(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        if ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 1:
            raise TypeError(f"{name}: expected int64 [n], got {ids.dtype} {list(ids.shape)}")
        place = self._storage.place
        ids = ids.to(device=place.device, dtype=torch.int64)
        known = (ids >= 0) & (ids < place.numel())
        known &= place[torch.where(known, ids, 0)] >= 0 if place.numel() else known
        if not bool(known.all()):
            raise ValueError(f"{name}: expected ids in the index, got {int(ids[~known][0])}")
        return ids

    def _excluded(self, exclude: Exclude, queries: torch.Tensor) -> ExcludedPairs:
        place = self._storage.place
        ids, offsets = normalize_exclude(exclude, queries.shape[0], place.numel(), place.device)
        return ExcludedPairs.from_offsets(place[ids], offsets)

    def _view(self) -> Table:
        return Table(self._storage.live("rows"), self._storage.live("ids"))

    def _search_triton(
        self, query: Queries, k: int, excluded: ExcludedPairs
    ) -> tuple[torch.Tensor, torch.Tensor, SearchStats]:
        from ..topk.impl import triton as triton_impl
        from ..topk.impl.triton_kernels import scan_rows
        from .triton import scan_codes

        view = self._view()
        kind = self._scans.device_kind()
        scanned = None
        if kind and len(view):
            scanned = scan_codes(query, self._storage.copy(kind), self._storage.mean)
        elif len(view):
            scanned = scan_rows(query, view.rows, self._storage.live("norm"))
        name = f"triton {kind or 'none'}"
        return triton_impl.certified_topk(scanned, query, view, k, excluded, name)


def _finite(name: str, vectors: torch.Tensor) -> torch.Tensor:
    for start in range(0, vectors.shape[0], 65536):
        block = vectors[start : start + 65536]
        if not bool(torch.isfinite(block).all()):
            row = start + int((~torch.isfinite(block)).any(1).nonzero()[0, 0])
            raise ValueError(f"{name}: expected finite values, row {row} holds NaN or infinity")
    return vectors
