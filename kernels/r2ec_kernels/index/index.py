"""ItemIndex: a table prepared for searching, that can be written while it is searched."""

import io
import os
from collections.abc import Callable
from functools import partial
from multiprocessing.context import get_spawning_popen
from typing import Any, TypeVar

import torch

from .. import _dispatch
from .._checks import Ids, as_ids, check_scoring, check_shape, check_vectors, one_of
from .._exact.bounds import prepare_queries
from .._exact.excluded import Exclude, TensorExclude, as_exclude
from .._exact.included import Include, as_include
from ..rank.api import TargetStats
from ..rank.impl.torch import certified_stats
from ..topk.api import TopK, check_search
from ..topk.impl.common import SearchStats
from . import cpu, files
from .locks import SharedLock
from .scans import SCANS, ScanChoice, copy_kinds
from .selection import live_ids, selected
from .storage import Storage

_IMPLEMENTATIONS = frozenset({"torch", "triton"})

T = TypeVar("T")


class ItemIndex:
    """Exact top-K search over item vectors that are added, overwritten and removed in place.

    ``search`` equals ``item_topk`` over the stored rows, bit for bit, whatever ``scan`` is. A
    low-precision scan multiplies a small copy of the table first and certifies which rows can
    matter (docs/kernels/search.md); it changes time and memory only.

    Searches may run in several threads at once. A write, append or removal waits for running
    searches and is seen whole or not at all, also where it raises or is interrupted (Ctrl-C).

    An index can be copied (``copy.deepcopy``) and pickled, also while it is written: the copy holds
    the rows of one moment. It has a lock of its own, and codes made again of the rows.

    Args:
        items: [N, d], float32, bfloat16 or float16, finite; N may be 0. The rows are copied.
        similarity: "dot", "cosine" or "l2" (minus the unsquared distance).
        temperature: positive.
        scan: "none" multiplies the rows themselves; "fp16" (CPUs with FBGEMM), "bf16" and "int8" a
            copy of half or a quarter of a float32 table's size; "auto" keeps, on CPUs, the bf16
            copy where there are AMX tiles, else the fp16 copy, and the int8 copy for few queries
            (where the compiled scans are installed, or there is no FBGEMM); on GPUs the
            bf16 copy. It takes, batch size by batch size, the product it measured to be fastest.

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
        self._last_search: Callable[[], SearchStats] | None = None
        self._storage = Storage(similarity, copy_kinds(scan, items.device))
        self._lock = SharedLock(self._storage.repair)
        rows = _finite("items", items.detach())
        self._alone(lambda: self._storage.build(rows))
        self._scans = ScanChoice(scan, self._storage)

    def __len__(self) -> int:
        """Live rows."""
        return self._storage.size

    @property
    def num_ids(self) -> int:
        """Ids given so far, live or removed: the length of a mask by id."""
        return self._storage.place.numel()

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
        return self._lock.shared(lambda: (self._storage.place >= 0).nonzero()[:, 0])

    @property
    def items(self) -> torch.Tensor:
        """A copy of the rows by id, [highest id + 1, d]; the rows of removed ids are zero."""

        def copy() -> torch.Tensor:
            storage = self._storage
            table = torch.zeros(
                storage.place.numel(), self.dim, dtype=self.dtype, device=self.device
            )
            table[storage.live("ids")] = storage.live("rows")
            return table

        return self._lock.shared(copy)

    @property
    def last_search(self) -> SearchStats | None:
        """Statistics of the search that finished last in any thread; None before the first. On a
        GPU they stay there until they are asked for."""
        return None if self._last_search is None else self._last_search()

    def search(
        self,
        queries: torch.Tensor,
        k: int,
        *,
        exclude: Exclude = None,
        include: Include = None,
    ) -> TopK:
        """The k best live items for each query: ``item_topk`` over the stored rows.

        Args:
            queries: [B, d].
            k: at least 0; more than ``len(self)`` is padded with (-inf, -1).
            exclude: ids that are not returned, padded int64 [B, L], (values, offsets), or a list of
                each query's ids; numpy arrays too. Removed ids are allowed.
            include: the only ids that are returned, but for those that ``exclude`` takes: int64
                [S], in any order, repeats and removed ids allowed, or a mask by id, bool
                [highest id + 1]; tensors, numpy arrays, or a list of ids. None: all.
        """
        count = check_search(k, self.similarity, self.temperature)
        queries = self._checked_queries(queries)
        given, wanted = as_exclude(exclude, queries.shape[0]), as_include(include)
        scores, ids, stats = self._lock.shared(lambda: self._search(queries, count, given, wanted))
        self._last_search = stats
        return TopK(scores, ids)

    def _search(
        self,
        queries: torch.Tensor,
        k: int,
        exclude: TensorExclude,
        include: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, Callable[[], SearchStats]]:
        name = _dispatch.resolve("auto", self.device, "ItemIndex.search", _IMPLEMENTATIONS)
        if name == "triton":
            from .triton import search_storage

            kind = self._scans.device_kind()
            settings = queries, k, self.temperature
            return search_storage(self._storage, kind, *settings, exclude, include)
        settings = queries, k, self.temperature
        return cpu.search_storage(self._storage, self._scans, *settings, exclude, include)

    def target_stats(
        self,
        queries: torch.Tensor,
        targets: Ids,
        *,
        exclude: Exclude = None,
        include: Include = None,
        use_scan: bool = True,
    ) -> TargetStats:
        """Exact rank (from 1) and log-probability of each query's target among the live items.

        An fp16 copy, or, where AMX tiles multiply int8, one of two int8 numbers a column, serves
        where its rounding errors are expected to move a log-probability by less than 1e-3, the rows
        themselves elsewhere; ranks are exact always. The first call builds the second kind of copy
        (``scan="auto"``, a quarter of a float32 table's size).

        Args:
            queries: [B, d].
            targets: int64 [B], live ids, or an array or list of them; a target competes even where
                it is excluded, or not included. Ids that live on a GPU are checked only under
                ``R2EC_CHECK=1``; one that is not in the index has rank -1 and log-probability NaN
                there.
            exclude, include: as for ``search``.
            use_scan: False always reads the rows themselves: a log-probability then does not depend
                on the queries beside it by more than float32's rounding, which training wants.
        """
        queries = self._checked_queries(queries)
        wanted = as_ids("targets", targets)
        check_shape("targets", wanted, [queries.shape[0]])
        given, included = as_exclude(exclude, queries.shape[0]), as_include(include)
        name = _dispatch.resolve("auto", self.device, "ItemIndex.target_stats", _IMPLEMENTATIONS)
        if name == "triton":
            arguments = queries, wanted, given, included
            return self._lock.shared(partial(self._stats_on_device, *arguments))
        if use_scan and self._scans.wants_fine_copy():
            self._alone(self._storage.keep_fine)

        def stats() -> TargetStats:
            rows = self._storage.place[live_ids(self._storage, "targets", wanted)]
            table, excluded, rows = selected(self._storage, given, included, len(queries), rows)
            query = prepare_queries(queries, self.similarity, self.temperature)
            scans = self._scans.of_stats(query, table, use_scan)
            return TargetStats(*certified_stats(table, scans, query, rows, excluded))

        return self._lock.shared(stats)

    def _stats_on_device(
        self,
        queries: torch.Tensor,
        targets: torch.Tensor,
        exclude: TensorExclude,
        include: torch.Tensor | None,
    ) -> TargetStats:
        """``target_stats`` by the Triton kernels, of the rows themselves."""
        from .triton import stats_of_storage

        if _dispatch.checks_enabled() or targets.device != self.device:
            targets = live_ids(self._storage, "targets", targets)
        selection = self.temperature, exclude, include
        return TargetStats(*stats_of_storage(self._storage, queries, targets, *selection))

    def write(self, ids: Ids, rows: torch.Tensor) -> None:
        """Overwrite the rows [n, d] of live ids int64 [n] (or an array or list of them); of a
        repeated id the last row counts.

        Costs O(n d).
        """
        rows = self._checked_rows(rows)
        given = as_ids("ids", ids)
        if given.shape[0] != rows.shape[0]:
            raise ValueError(
                f"ids: expected one for each of {rows.shape[0]} rows, got {given.shape[0]}"
            )

        def write() -> None:
            live = live_ids(self._storage, "ids", given)
            order = torch.argsort(live, stable=True)
            ordered = live[order]
            last = torch.ones_like(ordered, dtype=torch.bool)
            last[:-1] = ordered[1:] != ordered[:-1]
            self._storage.write(ordered[last], rows[order[last]])

        self._alone(write)

    def append(self, rows: torch.Tensor) -> torch.Tensor:
        """Add rows [n, d]; returns their ids int64 [n], which were never used before."""
        rows = self._checked_rows(rows)
        return self._alone(lambda: self._storage.append(rows))

    def rows(self, ids: Ids) -> torch.Tensor:
        """Copies [n, d] of the rows of live ids int64 [n] (or an array or list of them)."""
        given = as_ids("ids", ids)

        def copy() -> torch.Tensor:
            return self._storage.live("rows")[
                self._storage.place[live_ids(self._storage, "ids", given)]
            ]

        return self._lock.shared(copy)

    def remove(self, ids: Ids) -> None:
        """Remove live, distinct ids int64 [n] (or an array or list of them); they are never used
        again."""
        given = as_ids("ids", ids)
        self.check_ids("ids", given)
        self._alone(lambda: self._storage.remove(live_ids(self._storage, "ids", given)))

    def check_ids(self, name: str, ids: torch.Tensor) -> None:
        """Raise ValueError, naming the argument ``name``, unless ``ids`` int64 [n] are live and
        distinct."""
        if ids.unique().numel() != ids.numel():
            raise ValueError(f"{name}: expected distinct ids, got repeats")
        self._lock.shared(lambda: live_ids(self._storage, name, ids))

    def save(self, path: str | os.PathLike) -> None:
        """Write the live rows, their ids and the settings to one safetensors file."""
        ids, rows, next_id = self._snapshot()
        settings = {
            "similarity": self.similarity,
            "temperature": repr(self.temperature),
            "scan": self.scan,
            "next_id": str(next_id),
        }
        files.write_tensors(path, {"ids": ids, "rows": rows}, settings)

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: str | torch.device = "cpu") -> "ItemIndex":
        """Read an index that ``save`` wrote.

        Raises:
            ValueError: the file is truncated, changed, or not an index.
        """
        settings, ids, rows, next_id = files.read_index(path)
        return cls._of(settings, ids.to(device), rows.to(device), next_id)

    @classmethod
    def _of(
        cls, settings: dict[str, Any], ids: torch.Tensor, rows: torch.Tensor, next_id: int
    ) -> "ItemIndex":
        """An index of rows [n, d] with their ids; the next new id is ``next_id``."""
        index = cls(rows, **settings)
        index._alone(lambda: index._storage.rename(ids, next_id))
        return index

    def _snapshot(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Copies of the live ids, ascending, and of their rows, and the next new id."""

        def copy() -> tuple[torch.Tensor, torch.Tensor, int]:
            storage = self._storage
            order = torch.argsort(storage.live("ids"))
            return storage.live("ids")[order], storage.live("rows")[order], storage.place.numel()

        return self._lock.shared(copy)

    def __reduce__(self) -> tuple[Any, ...]:
        settings = {
            "similarity": self.similarity,
            "temperature": self.temperature,
            "scan": self.scan,
        }
        ids, rows, next_id = self._snapshot()
        if get_spawning_popen() is None:
            return _restored, (type(self), settings, ids, rows, next_id)
        # A process that is being spawned would be sent tensors as open files, which close with the
        # copies made here before it has them.
        file = io.BytesIO()
        torch.save((ids, rows), file)
        return _restored_from_bytes, (type(self), settings, file.getvalue(), next_id)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ItemIndex":
        restore, arguments = self.__reduce__()
        memo[id(self)] = copied = restore(*arguments)
        return copied

    def _alone(self, work: Callable[[], T]) -> T:
        """What ``work()`` returns, while nobody else uses the index. Tensors that it stores can be
        written later, inside ``torch.inference_mode`` and outside."""
        if not torch.is_inference_mode_enabled():
            return self._lock.alone(work)
        with torch.inference_mode(False):
            return self._lock.alone(work)

    def _checked_queries(self, queries: torch.Tensor) -> torch.Tensor:
        check_vectors("queries", queries, d=self.dim, device=self.device)
        queries = queries.detach()
        return _finite("queries", queries) if _dispatch.checks_enabled() else queries

    def _checked_rows(self, rows: torch.Tensor) -> torch.Tensor:
        check_vectors("rows", rows, d=self.dim, device=self.device)
        if rows.dtype != self.dtype:
            raise TypeError(f"rows: expected {self.dtype} like the index, got {rows.dtype}")
        return _finite("rows", rows.detach())


def _restored(kind: type[ItemIndex], *arguments: Any) -> ItemIndex:
    """What a pickle calls."""
    return kind._of(*arguments)


def _restored_from_bytes(
    kind: type[ItemIndex], settings: dict[str, Any], tensors: bytes, next_id: int
) -> ItemIndex:
    """What the pickle for a spawned process calls."""
    ids, rows = torch.load(io.BytesIO(tensors))
    return kind._of(settings, ids, rows, next_id)


def _finite(name: str, vectors: torch.Tensor) -> torch.Tensor:
    for start in range(0, vectors.shape[0], 65536):
        block = vectors[start : start + 65536]
        if not bool(torch.isfinite(block).all()):
            row = start + int((~torch.isfinite(block)).any(1).nonzero()[0, 0])
            raise ValueError(f"{name}: expected finite values, row {row} holds NaN or infinity")
    return vectors
