"""The allow-list of a batch: the only items that are returned, or that compete.

Callers give ids int64 [S], in any order and repeated, or a bool mask [N]. Ops scan a table of those
rows alone where they are few (``restrict``; on GPUs, which must not wait for a count, where the ids
are, ``gather``), and else the whole table with the other rows switched off (``Table.allowed``).
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .._checks import MAX_ITEMS, Ids, as_ids, check_dense, is_array
from .._dispatch import checks_enabled
from .excluded import ExcludedPairs
from .table import Table

Include = Ids | None

# Rows that are gathered: a share of the table, because each is read, written and read again, and
# so many bytes, because they are memory above the inputs.
_GATHERED_SHARE, _GATHERED_BYTES = 4, 1 << 28
_WORTH_BYTES = 1 << 28  # of a table on a GPU: a smaller one is scanned before a gather is launched


def as_include(include: Any) -> torch.Tensor | None:
    """``include`` as a tensor: ids int64 [S] or a bool mask [N]."""
    if include is None:
        return None
    if isinstance(include, (set, frozenset)):
        include = list(include)
    if is_array(include) and not isinstance(include, torch.Tensor):
        array = np.array(include)
        include = torch.from_numpy(array) if array.dtype == bool else array
    if isinstance(include, torch.Tensor) and include.dtype == torch.bool:
        check_dense("include", include)
        if include.dim() != 1:
            raise ValueError(
                f"include: expected ids [S] or a mask [N], got shape {list(include.shape)}"
            )
        return include
    return as_ids("include", include)


def check_include(include: torch.Tensor | None, num_items: int) -> None:
    """Check the shape (not the values) of ``include`` for ids below ``num_items``."""
    if include is not None and include.dtype == torch.bool and include.shape[0] != num_items:
        raise ValueError(
            f"include: expected a mask of shape [{num_items}], got {list(include.shape)}"
        )


def normalize_include(
    include: torch.Tensor | None, num_items: int, device: torch.device
) -> torch.Tensor | None:
    """``include`` on ``device``: ids int64 [S] in 0..num_items-1, or a mask bool [num_items].

    Raises ValueError for other ids and other shapes. Ids that live on a GPU are checked only under
    ``R2EC_CHECK=1``, because the check waits for the device.
    """
    check_include(include, num_items)
    if include is None or include.dtype == torch.bool:
        return None if include is None else include.to(device)
    if include.numel() and (include.device.type == "cpu" or checks_enabled()):
        low, high = int(include.min()), int(include.max())
        if low < 0 or high >= num_items:
            raise ValueError(
                f"include: expected ids in 0..{num_items - 1}, got values in {low}..{high}"
            )
    return include.to(device)


def as_mask(include: torch.Tensor, num_items: int) -> torch.Tensor:
    """A normalized ``include`` as a mask bool [num_items], without a wait for its device. Ids
    beyond the items, which nobody has checked on a GPU, count for nothing."""
    if include.dtype == torch.bool:
        return include
    known = (include >= 0) & (include < num_items)
    mask = torch.zeros(num_items + 1, dtype=torch.bool, device=include.device)
    return mask.index_fill_(0, torch.where(known, include, num_items), True)[:num_items]


def include_part(include: Any, first: int, count: int) -> torch.Tensor | None:
    """The mask bool [count] of the items ``first`` .. first + count - 1, of a list or mask of more
    items than those."""
    given = as_include(include)
    if given is None:
        return None
    if given.dtype == torch.bool:
        if given.shape[0] < first + count:
            raise ValueError(
                f"include: expected a mask of at least {first + count} items, got {len(given)}"
            )
        return given[first : first + count]
    normalize_include(given, MAX_ITEMS, given.device)
    return as_mask(given - first, count)


def restrict(
    table: Table,
    include: torch.Tensor | None,
    excluded: ExcludedPairs,
    targets: torch.Tensor | None = None,
) -> tuple[Table, ExcludedPairs, torch.Tensor]:
    """What a search of the included rows searches: a table, the exclusions and targets in it.

    Few rows are gathered into a table of their own, with the targets, which are in it even where
    they are not included. Otherwise it is the same table, with the other rows switched off.

    Args:
        include: row positions int64 [S], repeats allowed, or a mask bool [N].
        excluded: pairs of queries and row positions; those of other rows are left out.
        targets: int64 [B], row positions; None for a call that has none.
    """
    if targets is None:
        targets = excluded.rows.new_empty(0)
    if include is None:
        return table, excluded, targets
    row_bytes = table.rows.shape[1] * table.rows.element_size()
    most = min(len(table) // _GATHERED_SHARE, _GATHERED_BYTES // row_bytes)
    rows = None
    if include.dtype != torch.bool:
        rows = include[(include >= 0) & (include < len(table))].unique()
    elif int(include.sum()) <= most:
        rows = include.nonzero()[:, 0]
    if rows is None or rows.numel() > most:
        return *switched_off(table, as_mask(include, len(table)), excluded), targets
    excluded = excluded.pairs_where(torch.isin(excluded.rows, rows))
    kept, own = rows, None
    others = targets[~torch.isin(targets, rows)]
    if others.numel():
        kept = torch.cat([rows, others]).unique()
        own = torch.isin(kept, rows)
    excluded = replace(excluded, rows=torch.searchsorted(kept, excluded.rows))
    gathered = Table(table.rows.index_select(0, kept), table.ids_of(kept), own)
    return gathered, excluded, torch.searchsorted(kept, targets.contiguous())


def switched_off(
    table: Table, allowed: torch.Tensor, excluded: ExcludedPairs
) -> tuple[Table, ExcludedPairs]:
    """The table with all rows but the ``allowed``, bool [N], switched off, and the exclusions among
    those."""
    excluded = excluded.pairs_where((excluded.rows >= 0) & allowed[excluded.rows])
    return replace(table, allowed=allowed), excluded


def is_gathered(table: Table, include: torch.Tensor) -> bool:
    """Whether to ``gather`` the included ids of a table on a GPU; known without a wait."""
    if include.dtype == torch.bool:
        return False
    row_bytes = table.rows.shape[1] * table.rows.element_size()
    most = min(len(table) // _GATHERED_SHARE, _GATHERED_BYTES // row_bytes)
    return include.numel() <= most and len(table) * row_bytes >= _WORTH_BYTES


def gather(
    table: Table, include: torch.Tensor, place: torch.Tensor | None
) -> tuple[Table, torch.Tensor]:
    """The rows of the ids ``include`` int64 [S] as a table [S, d], without a wait for the device.

    Repeated, removed and unknown ids have rows that are switched off.

    Args:
        place: int64, the row in ``table`` of each id, -1 for none; None: ids are rows.

    Returns the table and its own ``place``.
    """
    num_ids = len(table) if place is None else place.numel()
    ids = include.sort().values
    allowed = (ids >= 0) & (ids < num_ids)
    allowed[1:] &= ids[1:] != ids[:-1]
    ids = ids.clamp(0, num_ids - 1)
    rows = ids
    if place is not None:
        rows = place[ids]
        allowed &= rows >= 0
        rows = rows.clamp_min(0)
    own = torch.full((num_ids + 1,), -1, dtype=torch.int64, device=ids.device)
    number = torch.arange(ids.numel(), device=ids.device)
    own.index_copy_(0, torch.where(allowed, ids, num_ids), number)
    return Table(table.rows[rows], ids, allowed), own[:num_ids]
