"""Which rows may be among the k best, by the scan's two best scores of every group: one kernel.

With e the error bound of the scan and cut = (k-th largest group maximum) - 2 e, no row whose score
is below the cut can be among the k best. A group whose maximum reaches it gives one row to a
query's list; one whose second score reaches it too may hide more, and is listed whole.

Grid: queries x parts of the groups. Tile: [BLOCK_G] groups. Reads 8 bytes a group, writes 4 for
each one listed. Places in a list are handed out by atomic counters: the order differs from run to
run, and nothing depends on it. Numerics: float32 bounds, rounded up.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ...._scan.triton_queries import DeviceQueries
from .direction import added_unit
from .groups import (
    GROUPS,
    LOWEST,
    PACK_UNIT,
    GroupBest,
    Scanned,
    product_unit,
    row_of,
    unpack,
)

_PACK_UNIT = tl.constexpr(PACK_UNIT)
GIVEN_UP = tl.constexpr(1 << 29)  # added to the count of a query that has no cut
_LEAST = tl.constexpr(-(2.0 - 2.0**-23) * 2.0**127)  # of finite float32 numbers
_BLOCK_GROUPS = 1024  # groups of a program of ``_reach``
_WHOLE_ROWS = {False: 16, True: 64}  # of groups listed whole, a result: for rows, for codes


@triton.jit
def _error(
    i_m,
    bounds_ptr,
    limits_ptr,
    stride_bounds,
    unit,
    scan_unit,
    along_unit,
    root_d,
    SIMILARITY: tl.constexpr,
    CODES: tl.constexpr,
    HAS_ALONG: tl.constexpr,
):
    """How far the scan's scores of a query may be off: float32, infinite without a bound."""
    p_m = bounds_ptr + i_m
    norm, held = tl.load(p_m), tl.load(p_m + stride_bounds)
    missed, floor = tl.load(p_m + 2 * stride_bounds), tl.load(p_m + 3 * stride_bounds)
    high = tl.load(limits_ptr + 2) * 1.001 + root_d * (2.0**-62)
    size = high
    if SIMILARITY == "cosine":
        size = high * 0.0 + 1.0
    if HAS_ALONG:
        error = along_unit * (norm + 1.0) * size + floor
        far = tl.load(limits_ptr)
    elif SIMILARITY == "l2":
        error = unit * ((norm + high) * (norm + high)) + floor
    else:
        error = unit * norm * size + floor
    if CODES:
        residual, held_size = tl.load(limits_ptr), tl.load(limits_ptr + 1)
        error += 1.02 * (held * residual + (missed + scan_unit * (held + missed)) * held_size)
        if SIMILARITY == "l2":
            reach = held + held_size + residual
            error += 1.02 * (2.0**-21 + _PACK_UNIT) * (reach * reach)
    elif HAS_ALONG:
        error += 1.02 * (missed * far + scan_unit * (held + missed) * size + _PACK_UNIT * far)
    else:
        error += 1.02 * (missed + scan_unit * norm) * size
        if SIMILARITY == "l2":
            error += scan_unit * ((norm + high) * (norm + high))
    return tl.where(high < float("inf"), error, float("inf"))


@triton.jit
def _cut(kth, error, GROUP: tl.constexpr):
    """No row whose score is below it can be among the k best; -inf where nothing is known."""
    score = unpack(kth, GROUP)
    cut = score - 2.0 * error
    # Fewer than k groups hold a row that counts: all of those reach it. The others have no score.
    cut = tl.where((error < float("inf")) & ((score > -float("inf")) == 0), _LEAST, cut)
    return tl.where((cut == cut) & (cut < float("inf")), cut, -float("inf"))


@triton.jit
def _reach_kernel(
    first_ptr,
    second_ptr,
    kth_ptr,
    bounds_ptr,
    limits_ptr,
    cut_ptr,
    rows_ptr,
    groups_ptr,
    count_ptr,
    num_groups,
    stride_bounds,
    stride_kth,
    capacity,
    unit,
    scan_unit,
    along_unit,
    root_d,
    SIMILARITY: tl.constexpr,
    CODES: tl.constexpr,
    HAS_ALONG: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A part of a query's groups.

    rows, groups: int32 [M, capacity], single rows and whole groups that are listed; count: int32
    [M, 2], how many of each, from 0; cut: float32 [M].
    """
    i_m = tl.program_id(0).to(tl.int64)
    error = _error(
        i_m,
        bounds_ptr,
        limits_ptr,
        stride_bounds,
        unit,
        scan_unit,
        along_unit,
        root_d,
        SIMILARITY,
        CODES,
        HAS_ALONG,
    )
    cut = _cut(tl.load(kth_ptr + i_m * stride_kth), error, GROUP)
    if tl.program_id(1) == 0:
        tl.store(cut_ptr + i_m, cut)
        if cut == -float("inf"):
            tl.atomic_add(count_ptr + 2 * i_m, GIVEN_UP)
    if cut > -float("inf"):
        o_g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
        m_g = o_g < num_groups
        b_first = tl.load(first_ptr + i_m * num_groups + o_g, mask=m_g, other=LOWEST)
        b_reach = unpack(b_first, GROUP) >= cut
        b_second = tl.load(second_ptr + i_m * num_groups + o_g, mask=b_reach, other=LOWEST)
        b_whole = b_reach & (unpack(b_second, GROUP) >= cut)
        b_single = b_reach & (b_whole == 0)
        num_single = tl.sum(b_single.to(tl.int32), axis=0)
        if num_single > 0:
            start = tl.atomic_add(count_ptr + 2 * i_m, num_single)
            o_out = start + tl.cumsum(b_single.to(tl.int32), 0) - 1
            b_row = row_of(o_g, b_first & (GROUP - 1), GROUP, SPAN)
            tl.store(rows_ptr + i_m * capacity + o_out, b_row, mask=b_single & (o_out < capacity))
        num_whole = tl.sum(b_whole.to(tl.int32), axis=0)
        if num_whole > 0:
            start = tl.atomic_add(count_ptr + 2 * i_m + 1, num_whole)
            o_out = start + tl.cumsum(b_whole.to(tl.int32), 0) - 1
            tl.store(groups_ptr + i_m * capacity + o_out, o_g, mask=b_whole & (o_out < capacity))


@dataclass(frozen=True)
class Lists:
    """What ``_reach`` lists of each query: see the kernel."""

    cut: torch.Tensor
    rows: torch.Tensor
    groups: torch.Tensor
    count: torch.Tensor
    capacity: int


def capacity_of(count: int, k: int, group: int, batch: int, coded: bool) -> int:
    """Places of a query's list: a few rows a result, and whole groups, more for few queries.

    Groups are listed whole in number as k, too: with k a percent of the rows and exact scores, 18%
    of the groups of 32 that hold a result hold two. The error of codes lists several times more.
    """
    wholes = min(256, max(32, 4096 // max(1, batch)))
    return min(count, 8 * k + 512 + max(wholes * group, _WHOLE_ROWS[coded] * k))


def reach(
    found: GroupBest, scanned: Scanned, query: DeviceQueries, k: int, group: int, capacity: int
) -> Lists:
    """List what may be among the k best rows of each query."""
    batch, num_groups = found.first.shape
    device, d = found.first.device, query.original.shape[1]
    kth = found.first.topk(k, dim=1).values
    cut = torch.empty(batch, dtype=torch.float32, device=device)
    rows, groups = torch.empty(2, batch, capacity, dtype=torch.int32, device=device)
    count = torch.zeros(batch, 2, dtype=torch.int32, device=device)
    scan_unit = product_unit(scanned.codes, query.operand.shape[1])
    _reach_kernel[(batch, triton.cdiv(num_groups, _BLOCK_GROUPS))](
        first_ptr=found.first,
        second_ptr=found.second,
        kth_ptr=kth[:, k - 1],
        bounds_ptr=query.bounds,
        limits_ptr=found.limits,
        cut_ptr=cut,
        rows_ptr=rows,
        groups_ptr=groups,
        count_ptr=count,
        num_groups=num_groups,
        stride_bounds=query.bounds.stride(0),
        stride_kth=k,
        capacity=capacity,
        unit=query.unit,
        scan_unit=scan_unit + (query.unit if scanned.coded else 0.0),
        along_unit=added_unit(query.operand.shape[1]),
        root_d=d**0.5,
        SIMILARITY=query.similarity,
        CODES=scanned.coded,
        HAS_ALONG=scanned.direction is not None,
        GROUP=group,
        SPAN=found.span,
        BLOCK_G=_BLOCK_GROUPS,
        num_warps=4,
    )
    return Lists(cut, rows, groups, count, capacity)


def aot_configs() -> list[dict[str, Any]]:
    """The kernel's configurations, for ahead-of-time compilation (``r2ec_kernels.aot``)."""
    kinds = dict.fromkeys(
        ("first_ptr", "second_ptr", "kth_ptr", "rows_ptr", "groups_ptr", "count_ptr"), "*i32"
    )
    kinds |= dict.fromkeys(("bounds_ptr", "limits_ptr", "cut_ptr"), "*fp32")
    kinds |= dict.fromkeys(("unit", "scan_unit", "along_unit", "root_d"), "fp32")
    found = []
    shipped = (("dot", False), ("l2", False), ("cosine", True), ("l2", True))
    for (similarity, coded), group in itertools.product(shipped, GROUPS):
        constants = {"SIMILARITY": similarity, "CODES": coded, "GROUP": group}
        constants |= {"HAS_ALONG": similarity == "dot"}
        constants |= {"SPAN": 128, "BLOCK_G": _BLOCK_GROUPS}
        names = _reach_kernel.arg_names
        found.append(
            {
                "name": "topk.reach",
                "kernel": _reach_kernel,
                "signature": {
                    n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names
                },
                "constexprs": constants,
                "num_warps": 4,
                "num_stages": 1,
                "uses_tensor_cores": False,
                # few groups reach the cut, whose second score and place in a list are 8 bytes more
                "work": {
                    "sizes": f"groups={_BLOCK_GROUPS}",
                    "bytes": 4 * _BLOCK_GROUPS,
                    "flops": 0,
                    "straight": True,
                },
                "budget": {"loop": 1150, "registers": 64},
            }
        )
    return found
