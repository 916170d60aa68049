"""What callers name by id, as rows of a storage: live items, exclusions, and an allow-list."""

import torch

from .._exact.excluded import ExcludedPairs, TensorExclude, normalize_exclude
from .._exact.included import as_mask, normalize_include, restrict
from .._exact.table import Table
from .storage import Storage


def view(storage: Storage, included: torch.Tensor | None = None) -> Table:
    """The live rows and their ids; those that are not included (``normalize_include``) are switched
    off, without a wait for the device."""
    ids = storage.live("ids")
    allowed = None if included is None else as_mask(included, storage.place.numel())[ids]
    return Table(storage.live("rows"), ids, allowed)


def live_ids(storage: Storage, name: str, ids: torch.Tensor) -> torch.Tensor:
    """``ids`` where the storage is; raises ValueError unless all are live."""
    place = storage.place
    ids = ids.to(place.device)
    known = (ids >= 0) & (ids < place.numel())
    known &= place[torch.where(known, ids, 0)] >= 0 if place.numel() else known
    if not bool(known.all()):
        raise ValueError(f"{name}: expected ids in the index, got {int(ids[~known][0])}")
    return ids


def excluded_rows(
    storage: Storage, exclude: TensorExclude, batch: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``exclude`` as ``row_search.search`` takes it: rows of the storage, -1 for ids that were
    removed, and where each query's begin."""
    if exclude is None:
        return None, None
    place = storage.place
    ids, offsets = normalize_exclude(exclude, batch, place.numel(), place.device)
    return place[ids], offsets


def selected(
    storage: Storage,
    exclude: TensorExclude,
    include: torch.Tensor | None,
    batch: int,
    targets: torch.Tensor | None = None,
) -> tuple[Table, ExcludedPairs, torch.Tensor]:
    """The table that a call of ``batch`` queries reads, and the exclusions and the targets in it
    (``included.restrict``). Ids that were removed count for nothing.

    targets: int64 [B], rows of the storage; None for a call that has none.
    """
    place = storage.place
    ids, offsets = normalize_exclude(exclude, batch, place.numel(), place.device)
    excluded = ExcludedPairs.from_offsets(place[ids], offsets)
    included = normalize_include(include, place.numel(), place.device)
    if included is not None and included.dtype == torch.bool:
        included = included[storage.live("ids")]
    elif included is not None:
        included = place[included]
        included = included[included >= 0]
    return restrict(view(storage), included, excluded, targets)
