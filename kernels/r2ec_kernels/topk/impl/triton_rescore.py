"""The exact end of a search: canonical order keys of the listed rows, and the k best of them.

``_rescore``    gives every row of a query's list (``triton_candidates``) its order key.
``search_all``  (``triton_search_all``) does so for all rows of the groups that reach the cut, for a
                query whose list overflowed or whose scores no bound holds for. It is launched
                always and ends at once where nothing is to be done: nothing waits for the host.
``_finish``     turns the k largest keys into scores and ids.

Grids: queries x parts of the list; queries; queries. Reads d elements of every listed row, writes
8 bytes a place of a list. Memory: 8 bytes a place. Numerics: float64 in the canonical order
(``_exact.triton_scores``), rounded once.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ..._exact.table import Table
from ..._exact.triton_scores import PADDING, float64_of, halving_places, scores_and_ids
from ..._scan.triton_exclusions import Exclusions
from ..._scan.triton_queries import DeviceQueries
from .triton_candidates import GIVEN_UP, Lists
from .triton_groups import GROUPS, GroupBest, row_of
from .triton_rows import row_keys
from .triton_search_all import search_all_kernel

_TILE = 4096  # columns of the rows that a program scores at once
_MAX_ROWS = 32  # of a tile: not more than the smallest group has
# of ``_rescore``, about: eight a multiprocessor; Triton's interpreter runs one after the other
_PROGRAMS = 1 if triton.knobs.runtime.interpret else 1056
_BLOCK_EXCLUDED = 64
_BLOCK_KEYS = 1024
_BLOCK_RESULTS = 256
# Of ``aot --budget``, on sm_90: all instructions, by kernel, type, columns, and whether all rows
# are scored. What the code holds, 3 to 5% above.
_BUDGET = {
    ("topk.rescore", "bf16", 128, False): 8900,
    ("topk.rescore", "bf16", 128, True): 6600,
    ("topk.rescore", "bf16", 1000, False): 1810,
    ("topk.rescore", "bf16", 1000, True): 1515,
    ("topk.rescore", "bf16", 4096, False): 1440,
    ("topk.rescore", "bf16", 4096, True): 1315,
    ("topk.rescore", "fp32", 1000, False): 1455,
    ("topk.rescore", "fp32", 1000, True): 1135,
    ("topk.rescore", "fp16", 1000, False): 1315,
    ("topk.rescore", "fp16", 1000, True): 985,
    ("topk.search_all", "bf16", 128, False): 2050,
    ("topk.search_all", "bf16", 1000, False): 1400,
    ("topk.search_all", "bf16", 4096, False): 2160,
    ("topk.search_all", "fp32", 1000, False): 1245,
    ("topk.search_all", "fp16", 1000, False): 1220,
}


@triton.jit
def _rescore_kernel(
    q_ptr,
    x_ptr,
    ids_ptr,
    exclude_ptr,
    exclude_start_ptr,
    allowed_ptr,
    rows_ptr,
    groups_ptr,
    count_ptr,
    cut_ptr,
    keys_ptr,
    num_items,
    d,
    stride_q,
    stride_x,
    capacity,
    temperature,
    ALL: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    SIMILARITY: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A part of a query's list, or (ALL) of all rows. keys: int64 [M, capacity], PADDING behind.

    A query whose list is too long is left to ``_search_all``; so is one with an infinite score,
    whose cut then counts for nothing.
    """
    i_m = tl.program_id(0).to(tl.int64)
    temperature = float64_of(temperature)
    o_d, m_d = halving_places(d, WIDTH, LEVELS)
    b_q = tl.load(q_ptr + i_m * stride_q + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_q = tl.reshape(b_q.to(tl.float64), [1, WIDTH])
    if ALL:
        num_single, total = num_items, num_items
    else:
        num_single = tl.load(count_ptr + 2 * i_m)
        total = num_single + tl.load(count_ptr + 2 * i_m + 1) * GROUP
        if (num_single > capacity) | (total > capacity):
            total = 0
    for start in range(tl.program_id(1) * ROWS, capacity, tl.num_programs(1) * ROWS):
        o_c = start + tl.arange(0, ROWS)
        b_keys = tl.full([ROWS], PADDING, tl.int64)
        if start < total:
            if ALL:
                b_row = o_c
            else:
                o_w = tl.maximum(o_c - num_single, 0)
                m_w = (o_c >= num_single) & (o_c < total)
                b_group = tl.load(groups_ptr + i_m * capacity + o_w // GROUP, mask=m_w, other=0)
                b_row = tl.load(rows_ptr + i_m * capacity + o_c, mask=o_c < num_single, other=0)
                b_row = tl.where(m_w, row_of(b_group, o_w % GROUP, GROUP, SPAN), b_row)
            b_keys, infinite = row_keys(
                i_m,
                b_row,
                (o_c < total) & (b_row < num_items),
                b_q,
                o_d,
                m_d,
                x_ptr,
                ids_ptr,
                exclude_ptr,
                exclude_start_ptr,
                allowed_ptr,
                stride_x,
                temperature,
                ROWS,
                WIDTH,
                LEVELS,
                SIMILARITY,
                HAS_IDS,
                HAS_EXCLUDE,
                HAS_ALLOWED,
                BLOCK_E,
            )
            if not ALL:  # noqa: SIM102 - known when it is compiled
                if infinite:
                    tl.store(cut_ptr + i_m, -float("inf"))
                    tl.atomic_max(count_ptr + 2 * i_m, GIVEN_UP)
        tl.store(keys_ptr + i_m * capacity + o_c, b_keys, mask=o_c < capacity)


@triton.jit
def _finish_kernel(
    keys_ptr,
    scores_ptr,
    ids_ptr,
    width,
    k,
    BLOCK_K: tl.constexpr,
):
    """Order keys [M, width] as scores and ids [M, k]; (-inf, -1) for no item."""
    i_m = tl.program_id(0).to(tl.int64)
    for start in range(0, k, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        b_keys = tl.load(keys_ptr + i_m * width + o_k, mask=o_k < width, other=-(2**63))
        b_scores, b_ids = scores_and_ids(b_keys)
        tl.store(scores_ptr + i_m * k + o_k, b_scores, mask=o_k < k)
        tl.store(ids_ptr + i_m * k + o_k, b_ids, mask=o_k < k)


def _tile(d: int, columns: int = _TILE) -> dict[str, int]:
    """The compile-time sizes of a tile of rows of d columns, of about ``columns`` in all."""
    width = triton.next_power_of_2(max(1, d))
    rows = min(_MAX_ROWS, max(1, columns // width))
    return {"ROWS": rows, "WIDTH": width, "LEVELS": width.bit_length() - 1}


def _warps(width: int) -> int:
    return 4 if width <= _TILE else 8 if width <= 2 * _TILE else 16


def _rows_of(query: DeviceQueries, table: Table, excluded: Exclusions | None) -> dict[str, Any]:
    """The arguments that kernels share which score rows."""
    rows, d = table.rows, query.original.shape[1]
    return {
        "q_ptr": query.original,
        "x_ptr": rows,
        "ids_ptr": table.ids,
        "exclude_ptr": None if excluded is None else excluded.ids,
        "exclude_start_ptr": None if excluded is None else excluded.start,
        "allowed_ptr": None if table.allowed is None else table.allowed.view(torch.int8),
        "num_items": rows.shape[0],
        "d": d,
        "stride_q": query.original.stride(0),
        "stride_x": rows.stride(0),
        "temperature": query.temperature_bits,
        **_tile(d),
        "SIMILARITY": query.similarity,
        "HAS_IDS": table.ids is not None,
        "HAS_EXCLUDE": excluded is not None,
        "HAS_ALLOWED": table.allowed is not None,
        "BLOCK_E": _BLOCK_EXCLUDED,
        "num_warps": _warps(_tile(d)["WIDTH"]),
        "enable_fp_fusion": False,  # a squared difference is rounded before it is added
    }


def listed_keys(
    query: DeviceQueries,
    table: Table,
    lists: Lists,
    found: GroupBest,
    group: int,
    k: int,
    excluded: Exclusions | None,
) -> torch.Tensor:
    """Order keys int64 [B, capacity] of the listed rows; the k best of all rows are among them."""
    batch, capacity = len(query), lists.capacity
    given = _rows_of(query, table, excluded)
    keys = torch.empty(batch, capacity, dtype=torch.int64, device=table.rows.device)
    parts = min(triton.cdiv(capacity, given["ROWS"]), max(1, _PROGRAMS // batch))
    shared: dict[str, Any] = {"capacity": capacity, "keys_ptr": keys}
    shared |= {"GROUP": group, "SPAN": found.span}
    shared |= {"count_ptr": lists.count, "cut_ptr": lists.cut}
    _rescore_kernel[(batch, parts)](
        rows_ptr=lists.rows, groups_ptr=lists.groups, ALL=False, **shared, **given
    )
    search_all_kernel[(batch,)](
        first_ptr=found.first,
        num_groups=found.first.shape[1],
        k=k,
        BLOCK_C=_BLOCK_KEYS,
        **shared,
        **(given | _tile(query.original.shape[1], _TILE // 8)),  # it has more to remember
    )
    return keys


def every_key(query: DeviceQueries, table: Table, excluded: Exclusions | None) -> torch.Tensor:
    """Order keys int64 [B, N] of all rows, for tables that are small beside k."""
    batch, count = len(query), len(table)
    given = _rows_of(query, table, excluded)
    keys = torch.empty(batch, count, dtype=torch.int64, device=table.rows.device)
    parts = min(triton.cdiv(count, given["ROWS"]), max(1, _PROGRAMS // batch))
    nothing = dict.fromkeys(("rows_ptr", "groups_ptr", "count_ptr", "cut_ptr"))
    _rescore_kernel[(batch, parts)](
        keys_ptr=keys, capacity=count, GROUP=GROUPS[0], SPAN=GROUPS[0], ALL=True, **nothing, **given
    )
    return keys


def best_of(keys: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores float32 and ids int64 [B, k] of the largest keys, padded with (-inf, -1)."""
    batch, width = keys.shape[0], min(k, keys.shape[1])
    best = keys.topk(width, dim=1).values
    scores = torch.empty(batch, k, dtype=torch.float32, device=keys.device)
    ids = torch.empty(batch, k, dtype=torch.int64, device=keys.device)
    block = min(_BLOCK_RESULTS, triton.next_power_of_2(k))
    _finish_kernel[(batch,)](best, scores, ids, width, k, BLOCK_K=block, num_warps=1)
    return scores, ids


def aot_configs() -> list[dict[str, Any]]:
    """The kernels' configurations, for ahead-of-time compilation (``r2ec_kernels.aot``)."""
    kinds = {"keys_ptr": "*i64", "ids_ptr": "*i64", "temperature": "i64", "scores_ptr": "*fp32"}
    kinds |= dict.fromkeys(("exclude_ptr", "exclude_start_ptr"), "*i64")
    kinds |= dict.fromkeys(("rows_ptr", "groups_ptr", "count_ptr", "first_ptr"), "*i32")
    kinds |= {"cut_ptr": "*fp32", "allowed_ptr": "*i8"}
    flags = {"HAS_IDS": True, "HAS_EXCLUDE": True, "BLOCK_E": _BLOCK_EXCLUDED}
    flags |= {"HAS_ALLOWED": True}

    def case(
        kernel: Any, constants: dict[str, Any], warps: int, work: dict[str, Any], **given: str
    ) -> dict[str, Any]:
        types = kinds | given
        return {
            "work": work | {"flops": 0, "straight": True},
            "name": f"topk.{kernel.fn.__name__.strip('_').removesuffix('_kernel')}",
            "kernel": kernel,
            "signature": {
                n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names
            },
            "constexprs": constants,
            "num_warps": warps,
            "num_stages": 3,
            "uses_tensor_cores": False,
        }

    # 8 bytes read and 12 written a result
    results = {"sizes": f"k={_BLOCK_RESULTS}", "bytes": 20 * _BLOCK_RESULTS}
    found = [case(_finish_kernel, {"BLOCK_K": _BLOCK_RESULTS}, 1, results)]
    found[0]["budget"] = {"loop": 200}
    # The type of the numbers changes their load alone, so not every pair is compiled.
    for kind, similarity, d in (
        *(("bf16", "cosine", d) for d in (128, 1000, 4096)),
        ("fp32", "l2", 1000),
        ("fp16", "dot", 1000),
    ):
        for every in (False, True, None):
            kernel = search_all_kernel if every is None else _rescore_kernel
            tile = _tile(d) if every is not None else _tile(d, _TILE // 8)
            constants = tile | {"SIMILARITY": similarity, **flags}
            constants |= {"GROUP": GROUPS[0], "SPAN": 128}
            constants |= {"BLOCK_C": _BLOCK_KEYS} if every is None else {"ALL": every}
            given = {"q_ptr": f"*{kind}", "x_ptr": f"*{kind}"}
            # one pass: the numbers of its rows, their place in the list or table, a key for each
            size = 4 if kind == "fp32" else 2
            work = {"sizes": f"d={d}", "bytes": tile["ROWS"] * (d * size + 12)}
            found.append(case(kernel, constants, _warps(tile["WIDTH"]), work, **given))
            found[-1]["budget"] = {"loop": _BUDGET[found[-1]["name"], kind, d, bool(every)]}
    return found
