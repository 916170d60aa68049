"""item_topk on the tensor cores: one pass that keeps two scores a group of rows, then certainty.

The kernel multiplies a tile of items with a tile of queries and keeps, for every query and every
group of ``group`` rows, the two largest scores, each packed with its row's place in the group into
an int32: nothing of size [B, N] leaves it, and there are no atomics. Then, with e the error bound:

- cut = (k-th largest group maximum) - 2 e: no row whose score is below it can be among the best k;
- a group whose maximum reaches the cut gives one candidate; one whose second score reaches it too
  may hide more and is opened whole;
- candidates are scored canonically and sorted.

Excluded rows are masked inside the kernel, from lists sorted by tile, so they cost no kept score.
Capacities are fixed, so nothing waits for the host. A query that does not fit is reported as
unresolved and takes the dense path.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..canonical import (
    PADDING_KEY,
    canonical_scores,
    from_order_keys,
    is_capturing,
    order_keys,
)
from ..exclude import Exclude, normalize_exclude, split_exclude
from .bounds import HUGE, Queries, prepare_queries
from .codes import padded, scaled_queries
from .engine import Excluded, SearchStats, Table, dense_topk
from .launch import Launch, candidates, choose
from .plain import PlainTable

GROUPS = (32, 128)  # rows of a group
LOWEST = tl.constexpr(-(2**31))
_PACK_UNIT = 2.0**-15  # group index in the low bits of a score: at most 7 bits of 24
_TENSOR_CORE_UNIT = 2.0**-22  # a term of a tensor-core sum, which may be truncated, not rounded
_SPLIT_UNIT = 2.0**-15  # float32 operands as sums of two bfloat16
_OPENED = 16  # groups a query may open
_DENSE_SHARE = 64  # k above rows / 64 takes the dense path
_GATHERED = 1 << 24  # elements of rows gathered at once


@triton.jit
def _group_best_kernel(
    x_ptr,
    q_ptr,
    mul_ptr,
    sub_ptr,
    pair_row_ptr,
    pair_of_ptr,
    pair_start_ptr,
    first_ptr,
    second_ptr,
    num_rows,
    batch,
    dim,
    stride_x,
    stride_q,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_MUL: tl.constexpr,
    HAS_SUB: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    i_n = tl.program_id(0) % tl.cdiv(batch, BLOCK_N)
    i_m = tl.program_id(0) // tl.cdiv(batch, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m = o_m < num_rows
    m_n = o_n < batch
    p_x = x_ptr + o_m.to(tl.int64)[:, None] * stride_x + o_k[None, :]
    p_q = q_ptr + o_n.to(tl.int64)[None, :] * stride_q + o_k[:, None]
    b_s = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, dim, BLOCK_K):
        # [BLOCK_M, BLOCK_K] items, [BLOCK_K, BLOCK_N] queries
        if EVEN_K:
            b_x = tl.load(p_x + k, mask=m_m[:, None], other=0)
            b_q = tl.load(p_q + k, mask=m_n[None, :], other=0)
        else:
            m_k = k + o_k < dim
            b_x = tl.load(p_x + k, mask=m_m[:, None] & m_k[None, :], other=0)
            b_q = tl.load(p_q + k, mask=m_n[None, :] & m_k[:, None], other=0)
        if WIDEN:
            b_x, b_q = b_x.to(tl.float32), b_q.to(tl.float32)
        else:
            b_x = b_x.to(b_q.dtype)
        b_s = tl.dot(b_x, b_q, b_s, input_precision=PRECISION)
    if HAS_MUL:
        b_s = b_s * tl.load(mul_ptr + o_m, mask=m_m, other=0)[:, None]
    if HAS_SUB:
        b_s = b_s - tl.load(sub_ptr + o_m, mask=m_m, other=0)[:, None]
    # Signed integers in the order of the floats; the low bits say which row of the group it is.
    b_i = b_s.to(tl.int32, bitcast=True)
    b_i = b_i ^ ((b_i >> 31) & 0x7FFFFFFF)
    b_i = (b_i & -GROUP) | (o_m % GROUP)[:, None]
    b_i = tl.where(m_m[:, None], b_i, LOWEST)
    if HAS_PAIRS:
        for e in range(
            tl.load(pair_start_ptr + tl.program_id(0)),
            tl.load(pair_start_ptr + tl.program_id(0) + 1),
        ):
            is_row = o_m == tl.load(pair_row_ptr + e)
            is_query = o_n == tl.load(pair_of_ptr + e)
            b_i = tl.where(is_row[:, None] & is_query[None, :], LOWEST, b_i)
    # [groups, GROUP, BLOCK_N]
    b_i = tl.reshape(b_i, [BLOCK_M // GROUP, GROUP, BLOCK_N])
    b_first = tl.max(b_i, axis=1)
    b_second = tl.max(tl.where(b_i == b_first[:, None, :], LOWEST, b_i), axis=1)
    o_g = i_m * (BLOCK_M // GROUP) + tl.arange(0, BLOCK_M // GROUP)
    m_g = (o_g < tl.cdiv(num_rows, GROUP))[:, None] & m_n[None, :]
    o_out = o_g.to(tl.int64)[:, None] * batch + o_n[None, :]
    tl.store(first_ptr + o_out, b_first, mask=m_g)
    tl.store(second_ptr + o_out, b_second, mask=m_g)


@dataclass(frozen=True)
class Scanned:
    """What the kernel multiplies, and how far its scores may be off.

    Attributes:
        codes: [N, >= d], float32, bfloat16, float16 or int8.
        operand: [B, d], bfloat16 for int8 codes, else of the codes' type.
        mul, sub: float32 [N] or None: score = product * mul - sub.
        error: float32 [B]; infinite or NaN where float32 cannot hold the numbers.
    """

    codes: torch.Tensor
    operand: torch.Tensor
    mul: torch.Tensor | None
    sub: torch.Tensor | None
    error: torch.Tensor


def product_unit(codes: torch.Tensor, dim: int) -> float:
    """Relative error, to |q| |x|, of the kernel's scores beyond what ``Queries.unit`` holds."""
    split = _SPLIT_UNIT if codes.dtype == torch.float32 else 0.0
    return (dim + 32) * _TENSOR_CORE_UNIT + split + _PACK_UNIT


def scan_rows(query: Queries, rows: torch.Tensor, norms: torch.Tensor | None) -> Scanned:
    """A pass over the stored rows [N, d] themselves; ``norms`` float32 [N], None: taken here."""
    if norms is None:
        blocks = [torch.linalg.vector_norm(b.float(), dim=1) for b in rows.split(1 << 20)]
        norms = torch.cat(blocks) if blocks else rows.new_empty(0, dtype=torch.float32)
    high = norms.max() * 1.001 + rows.shape[1] ** 0.5 * 2.0**-62
    operand = query.scaled.to(rows.dtype)
    missed = torch.linalg.vector_norm(query.scaled.double() - operand.double(), dim=1).float()
    unit = product_unit(rows, rows.shape[1])
    size = high if query.similarity != "cosine" else torch.ones_like(high)
    error = query.product_error(high) + 1.01 * (missed + unit * query.norm) * size
    mul = sub = None
    trusted = high <= HUGE
    if query.similarity == "cosine":
        # A zero row scores 0 by the product alone; one too small for float32 is not trusted.
        small = (norms < 1 / HUGE) & (rows != 0).any(1)
        trusted = trusted & ~small.any()
        mul = torch.where(norms > 0, norms.reciprocal(), 0.0)
    elif query.similarity == "l2":
        sub = 0.5 * norms * norms
        error = error + unit * (query.norm + high) ** 2
    error = torch.where(trusted, error, float("inf"))
    return Scanned(rows, operand, mul, sub, error)


def scan_codes(query: Queries, fields: dict[str, torch.Tensor], mean: torch.Tensor) -> Scanned:
    """A pass over the live ``fields`` of a low-precision copy (see ``codes.encode``)."""
    codes = fields["code"]
    exact = scaled_queries(query)
    if query.similarity == "l2":
        exact = exact - mean
    exact = padded(exact)
    operand = exact.bfloat16()
    norm = torch.linalg.vector_norm(exact, dim=1)
    missed = torch.linalg.vector_norm(exact - operand.double(), dim=1)
    residual, size, high = (fields[name].max() for name in ("residual", "size", "norm"))
    unit = product_unit(codes, exact.shape[1]) + query.unit
    error = norm * residual + (missed + unit * (norm + missed)) * size
    if query.similarity == "l2":
        error = error + (2.0**-21 + _PACK_UNIT) * (norm + size + residual) ** 2
    error = 1.01 * error.float() + query.product_error(high * 1.001)
    error = torch.where(fields["trusted"].all(), error, float("inf"))
    mul = fields["scale"] if codes.dtype == torch.int8 else None
    sub = fields["half"] if query.similarity == "l2" else None
    return Scanned(codes, operand, mul, sub, error)


def group_best(
    scanned: Scanned, group: int, pair_row: torch.Tensor, pair_of: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed first and second scores of every group: int32 [B, groups] each.

    ``pair_row``, ``pair_of``: int64 [E], excluded (row, query) pairs; row -1 for none.
    """
    codes, operand = scanned.codes, scanned.operand
    batch, count = operand.shape[0], codes.shape[0]
    groups = triton.cdiv(count, group)
    first = torch.empty(groups, batch, dtype=torch.int32, device=codes.device)
    second = torch.empty_like(first)

    def launch(config: Launch) -> None:
        tiles = triton.cdiv(count, config.block_m)
        across = triton.cdiv(batch, config.block_n)
        tile = pair_row // config.block_m * across + pair_of // config.block_n
        tile = torch.where(pair_row < 0, tiles * across, tile)
        tile, order = tile.sort()
        programs = torch.arange(tiles * across + 1, device=codes.device)
        _group_best_kernel[(tiles * across,)](
            codes,
            operand,
            scanned.mul,
            scanned.sub,
            pair_row[order],
            pair_of[order],
            torch.searchsorted(tile, programs),
            first,
            second,
            count,
            batch,
            operand.shape[1],
            codes.stride(0),
            operand.stride(0),
            **constants(config, group, operand.shape[1], codes.dtype, scanned, pair_row.numel()),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    def seconds(config: Launch) -> float:
        return triton.testing.do_bench(lambda: launch(config))

    launch(choose(batch, codes.element_size(), codes.device, seconds))
    return first.T.contiguous(), second.T.contiguous()


def constants(
    config: Launch, group: int, dim: int, dtype: torch.dtype, scanned: Scanned, pairs: int
) -> dict[str, object]:
    """The compile-time arguments of the kernel."""
    interpreted = triton.knobs.runtime.interpret
    split = dtype == torch.float32 and not interpreted
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": group,
        "EVEN_K": dim % config.block_k == 0,
        "HAS_MUL": scanned.mul is not None,
        "HAS_SUB": scanned.sub is not None,
        "HAS_PAIRS": pairs > 0,
        "PRECISION": "bf16x3" if split else "ieee",
        "WIDEN": interpreted,
    }


def group_size(num_rows: int, k: int) -> int:
    """Rows of a group: about sqrt(2 N / k), of the sizes that the kernel has."""
    return GROUPS[num_rows >= 8192 * k]


def certified_topk(
    scanned: Scanned,
    query: Queries,
    table: Table,
    k: int,
    excluded: Excluded,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor, SearchStats]:
    """The k best rows of ``table`` for each query, exactly: see ``engine.certified_topk``.

    Under CUDA-graph capture no host decision is possible: a query that needs the dense path then
    returns NaN scores and ids -1, and is to be searched again outside the graph.
    """
    batch, count = query.original.shape[0], table.rows.shape[0]
    device = query.original.device
    keys = torch.full((batch, k), PADDING_KEY, dtype=torch.int64, device=device)
    width = min(k, count)
    if batch == 0 or width == 0:
        return *from_order_keys(keys), SearchStats("dense", batch, 0.0, 0, 0)
    if count < _DENSE_SHARE * width:
        keys[:, :width] = dense_topk(table, query, width, excluded)
        return *from_order_keys(keys), SearchStats("dense", batch, 0.0, 0, batch)
    found, unresolved, candidates, opened = _resolve(scanned, query, table, width, excluded)
    keys[:, :width] = found
    if is_capturing(device):
        scores, ids = from_order_keys(keys.masked_fill(unresolved[:, None], PADDING_KEY))
        scores = scores.masked_fill(unresolved[:, None], float("nan"))
        return scores, ids, SearchStats(name, batch, float("nan"), -1, -1)
    num_dense = int(unresolved.sum())
    if num_dense:
        keys[unresolved, :width] = dense_topk(
            table, query[unresolved], width, excluded.pick(unresolved)
        )
    kept = ~unresolved
    ratio = int(candidates[kept].sum()) / max(1, (batch - num_dense) * width)
    stats = SearchStats(
        name if num_dense < batch else "dense", batch, ratio, int(opened[kept].sum()), num_dense
    )
    return *from_order_keys(keys), stats


def _resolve(
    scanned: Scanned, query: Queries, table: Table, k: int, excluded: Excluded
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Order keys [B, k]; queries that need the dense path, candidates, opened groups: [B] each."""
    rows = table.rows
    group = group_size(rows.shape[0], k)
    first, second = group_best(scanned, group, excluded.rows, excluded.of)
    width = min(first.shape[1], 2 * k + 64)
    value, at = _unpack(first, group).topk(width, dim=1)
    cut = value[:, k - 1] - 2 * scanned.error
    reach = value >= cut[:, None]
    hidden = reach & (_unpack(second.gather(1, at), group) >= cut[:, None])
    unresolved = ~torch.isfinite(cut) | query.dense
    if width < first.shape[1]:
        unresolved |= reach[:, -1]
    slots = min(_OPENED, width)
    unresolved |= hidden.sum(1) > slots
    row = at * group + (first.gather(1, at) & (group - 1))
    _, chosen = hidden.to(torch.int32).topk(slots, dim=1)
    inside = torch.arange(group, device=rows.device)
    within = (at.gather(1, chosen)[:, :, None] * group + inside).flatten(1)
    valid = hidden.gather(1, chosen).repeat_interleave(group, dim=1) & (within < rows.shape[0])
    within = within.clamp_max(rows.shape[0] - 1)
    if not excluded.empty:
        of = torch.arange(within.shape[0], device=rows.device)[:, None].expand_as(within)
        valid &= ~excluded.holds(of, within)
    candidate = torch.cat([row.clamp_max(rows.shape[0] - 1), within], 1)
    valid = torch.cat([reach & ~hidden, valid], 1)
    keys = _canonical_keys(query, table, candidate, valid).topk(k, dim=1).values
    scores, _ = from_order_keys(keys)
    return keys, unresolved | torch.isinf(scores).any(1), valid.sum(1), hidden.sum(1)


def _unpack(packed: torch.Tensor, group: int) -> torch.Tensor:
    """Scores of packed values, rounded down to the bits that are left; -inf for no row."""
    bits = packed & -group
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.view(torch.float32).masked_fill(packed == LOWEST.value, float("-inf"))


def _canonical_keys(
    query: Queries, table: Table, candidate: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """Order keys of candidate rows [B, C]; PADDING_KEY where not valid."""
    batch, width = candidate.shape
    rows, ids = table.rows, table.ids
    keys = torch.full_like(candidate, PADDING_KEY)
    step = max(1, _GATHERED // max(1, width * rows.shape[1]))
    for start in range(0, batch, step):
        part = slice(start, min(batch, start + step))
        scores = canonical_scores(
            query.original[part], rows[candidate[part]], query.similarity, query.temperature
        )
        own = candidate[part] if ids is None else ids[candidate[part]]
        keys[part] = order_keys(scores, own).masked_fill(~valid[part], PADDING_KEY)
    return keys


def item_topk(
    queries: torch.Tensor,
    items: torch.Tensor,
    k: int,
    similarity: str,
    temperature: float,
    exclude: Exclude,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores float32 [B, k], indices int64 [B, k]); padded with (-inf, -1)."""
    values, offsets = _pairs(exclude, queries.shape[0], items.shape[0], items.device)
    query = prepare_queries(queries, similarity, temperature)
    if items.stride(-1) != 1:
        items = items.contiguous()
    scores, ids, _ = certified_topk(
        scan_rows(query, items, None),
        query,
        PlainTable(items),
        k,
        Excluded(values, offsets),
        "triton",
    )
    return scores, ids


def _pairs(
    exclude: Exclude, batch: int, num_items: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """``normalize_exclude``, without waiting for the device while a graph is captured."""
    if not is_capturing(device):
        return normalize_exclude(exclude, batch, num_items, device)
    values, offsets = split_exclude(exclude)
    if values is None:
        zero = torch.zeros(batch + 1, dtype=torch.int64, device=device)
        return zero[:0], zero
    if offsets is None:
        offsets = torch.arange(batch + 1, device=device) * values.shape[1]
    return values.flatten().long(), offsets.long()


def aot_configs() -> list[dict[str, Any]]:
    """Every configuration that ``launch`` ships, in the form that ``r2ec_kernels.aot`` reads."""
    types = {
        torch.int8: ("*i8", "*bf16"),
        torch.bfloat16: ("*bf16", "*bf16"),
        torch.float16: ("*fp16", "*fp16"),
        torch.float32: ("*fp32", "*fp32"),
    }
    others = {"first_ptr": "*i32", "second_ptr": "*i32", "mul_ptr": "*fp32", "sub_ptr": "*fp32"}
    others |= dict.fromkeys(("pair_row_ptr", "pair_of_ptr", "pair_start_ptr"), "*i64")
    others |= dict.fromkeys(("num_rows", "batch", "dim", "stride_x", "stride_q"), "i32")
    found = []
    for (dtype, (codes, operand)), backend in itertools.product(types.items(), ("cuda", "hip")):
        launches = [
            config
            for batch in (16, 64, 1024)
            for config in candidates(batch, dtype.itemsize, backend)
        ]
        for config, group in itertools.product(launches, GROUPS):
            given = {"x_ptr": codes, "q_ptr": operand, **others}
            arguments = _group_best_kernel.arg_names
            found.append(
                {
                    "name": "search.group_best",
                    "kernel": _group_best_kernel,
                    "signature": {name: given.get(name, "constexpr") for name in arguments},
                    "constexprs": {
                        "BLOCK_M": config.block_m,
                        "BLOCK_N": config.block_n,
                        "BLOCK_K": config.block_k,
                        "GROUP": group,
                        "EVEN_K": True,
                        "HAS_MUL": True,
                        "HAS_SUB": True,
                        "HAS_PAIRS": True,
                        "PRECISION": "bf16x3" if dtype == torch.float32 else "ieee",
                        "WIDEN": False,
                    },
                    "num_warps": config.num_warps,
                    "num_stages": config.num_stages,
                    "uses_tensor_cores": True,
                    "backend": backend,
                    "aligned": ("stride_x", "stride_q", "dim"),
                }
            )
    return found
