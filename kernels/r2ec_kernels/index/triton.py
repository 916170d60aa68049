"""Searches of an index by the Triton kernels: of its rows, or of a low-precision copy of them."""

from collections.abc import Callable

import torch

from .._exact.excluded import TensorExclude
from .._exact.table import Table
from .._scan.triton_exclusions import at_places, exclusions
from .._scan.triton_queries import prepare_on_device
from ..topk.impl.common import SearchStats
from ..topk.impl.triton import search
from ..topk.impl.triton_kernels import Scanned, operand_type
from .quantize import DIM_MULTIPLE
from .storage import Storage


def search_storage(
    storage: Storage,
    kind: str | None,
    queries: torch.Tensor,
    k: int,
    temperature: float,
    exclude: TensorExclude,
) -> tuple[torch.Tensor, torch.Tensor, Callable[[], SearchStats]]:
    """The k best live rows for each query: scores float32 [B, k], ids int64 [B, k], and what reads
    the statistics.

    kind: of the copy that is scanned; None: the rows themselves.
    """
    table = Table(storage.live("rows"), storage.live("ids"))
    excluded = exclusions(exclude, queries.shape[0], storage.place.numel(), storage.device)
    excluded = at_places(excluded, storage.place)
    similarity = storage.similarity
    if kind is None or not storage.size:
        scanned = _scan_of_rows(storage)
        query = prepare_on_device(queries, similarity, temperature, table.rows.dtype)
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
    return search(scanned, query, table, k, excluded, f"triton {kind or 'none'}")


def _scan_of_rows(storage: Storage) -> Scanned:
    similarity = storage.similarity
    return Scanned(
        storage.live("rows"),
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
