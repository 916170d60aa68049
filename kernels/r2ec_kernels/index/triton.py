"""An index by the Triton kernels: searches of its rows or of a low-precision copy, and ranks."""

from collections.abc import Callable
from dataclasses import replace

import torch

from .._exact.excluded import TensorExclude
from .._exact.included import gather, is_gathered, normalize_include
from .._exact.table import Table
from .._scan.triton_exclusions import exclusions
from .._scan.triton_queries import prepare_on_device
from ..rank.impl.triton import Norms, table_stats
from ..topk.impl.common import SearchStats
from ..topk.impl.triton import search
from ..topk.impl.triton.direction import prepare_rows
from ..topk.impl.triton.groups import Scanned, operand_type
from .quantize import DIM_MULTIPLE
from .selection import view
from .storage import Storage


def search_storage(
    storage: Storage,
    kind: str | None,
    queries: torch.Tensor,
    k: int,
    temperature: float,
    exclude: TensorExclude,
    include: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, Callable[[], SearchStats]]:
    """The k best live rows for each query: scores float32 [B, k], ids int64 [B, k], and what reads
    the statistics.

    kind: of the copy that is scanned; None: the rows themselves.
    """
    excluded = exclusions(exclude, queries.shape[0], storage.place.numel(), storage.device)
    similarity, place = storage.similarity, storage.place
    included = normalize_include(include, place.numel(), storage.device)
    table = _table(storage)
    if included is not None and is_gathered(table, included):
        table, place = gather(table, included, place)
        scanned, query = prepare_rows(table.rows, queries, similarity, temperature)
        return search(scanned, query, table, k, excluded, "triton gathered", place)
    table = _table(storage, included)
    if kind is None or not storage.size:
        scanned = _scan_of_rows(storage)
        width, dtype = scanned.codes.shape[1], scanned.codes.dtype
        query = prepare_on_device(queries, similarity, temperature, dtype, width=width)
    else:
        scanned = _scan_of_codes(storage, kind)
        query = prepare_on_device(
            queries,
            similarity,
            temperature,
            operand_type(scanned.codes),
            mean=storage.mean if similarity == "l2" else None,
            width=-(-storage.width // DIM_MULTIPLE) * DIM_MULTIPLE,
        )
    name = f"triton {kind or 'none'}"
    return search(scanned, query, table, k, excluded, name, place)


def _table(storage: Storage, included: torch.Tensor | None = None) -> Table:
    """``selection.view`` with zero columns behind the rows (``Storage.aligned_rows``)."""
    return replace(view(storage, included), rows=storage.aligned_rows())


def _scan_of_rows(storage: Storage) -> Scanned:
    similarity = storage.similarity
    return Scanned(
        storage.aligned_rows(),
        by_norm="none" if similarity == "dot" else similarity,
        norms=storage.live("norm"),
        limits=storage.limits("none").of_scan if storage.size else None,
    )


def _scan_of_codes(storage: Storage, kind: str) -> Scanned:
    copy = storage.copy(kind)
    return Scanned(
        copy.codes[: storage.size],
        mul=copy.scale if kind == "int8" else None,
        sub=copy.half if storage.similarity == "l2" else None,
        coded=True,
        limits=storage.limits(kind).of_scan,
    )


def stats_of_storage(
    storage: Storage,
    queries: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    exclude: TensorExclude,
    include: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank int64 [B] and log-probability float32 [B] of the ids ``targets`` int64 [B] among the
    live rows. An id that is not in the index has rank -1 and NaN."""
    excluded = exclusions(exclude, queries.shape[0], storage.place.numel(), storage.device)
    if not storage.size:
        nothing = torch.full((queries.shape[0],), torch.nan, device=targets.device)
        return targets.new_full(nothing.shape, -1), nothing
    norms = Norms(storage.live("norm"), storage.limits("none").of_scan)
    included = normalize_include(include, storage.place.numel(), storage.device)
    table = _table(storage, included)
    settings = storage.similarity, temperature
    return table_stats(queries, table, targets, *settings, excluded, norms, storage.place)
