"""The coarse scan on tensor cores: the two best scores of every group of rows, in one kernel.

For queries Q [M, d] (M = B) and the rows X [N, d] of a copy of the table it computes

    s[m, n] = mul[n] (q_m . x_n) - sub[n],          -inf for excluded pairs,

and keeps, for every query and every group of ``GROUP`` consecutive rows, the largest and the second
largest s, each packed with its row's place in the group into an int32 (the low bits of the score
give way). Nothing of size [M, N] is stored, and there are no atomics.

Grid: ceil(M / BLOCK_M) * ceil(N / BLOCK_N) programs in one dimension, queries fastest: programs
that run together share a tile of items, which memory delivers once.
Tile: items are the long side. The product is written items x queries, [BLOCK_N, BLOCK_M] in steps
of BLOCK_K columns, because the hardware's tile wants at least 64 rows on its left side and a batch
may have 16 queries or fewer.
Reads N d + M d elements from memory (the items again from cache for every tile of queries) and 4
to 8 bytes a row for mul and sub; writes 8 M N / GROUP bytes. FLOPs: 2 M N d.
Numerics: accumulated in float32 (float32 operands as three bfloat16 products); ``product_unit``
bounds the error, of tensor-core sums that may truncate and of the packing. Excluded pairs come
sorted by program, so each program visits its own and they cost no kept score.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..._exact.bounds import Queries
from ..._numbers import HUGE
from .launch import Launch, candidates, choose

GROUPS = (32, 128)  # rows of a group
LOWEST = tl.constexpr(-(2**31))
PACK_UNIT = 2.0**-15  # group index in the low bits of a score: at most 7 bits of 24
_TENSOR_CORE_UNIT = 2.0**-22  # a term of a tensor-core sum, which may be truncated, not rounded
_SPLIT_UNIT = 2.0**-15  # float32 operands as sums of two bfloat16
# Of ``aot --budget``, on sm_90: columns of the table that shares are predicted for; instructions of
# the loop by (bytes of a number, BLOCK_M), and of the epilogue, its shuffles and its accesses to
# shared memory by (BLOCK_M, GROUP). What the code holds, 3 to 5% above: tightened as it improves.
_AOT_WIDTH = 1024
_LOOP_BUDGET = {(1, 16): 410, (1, 64): 820, (1, 128): 248}
_LOOP_BUDGET |= {(2, 16): 110, (2, 32): 114, (2, 64): 124, (2, 128): 96}
_LOOP_BUDGET |= {(4, 16): 323, (4, 64): 545, (4, 128): 432}
_EPILOGUE_BUDGET = {(16, 32): (830, 52, 50), (16, 128): (735, 29, 31)}
_EPILOGUE_BUDGET |= {(32, 32): (860, 104, 92), (32, 128): (670, 54, 50)}
_EPILOGUE_BUDGET |= {(64, 32): (1700, 208, 175), (64, 128): (1290, 108, 92)}
_EPILOGUE_BUDGET |= {(128, 32): (1640, 208, 171), (128, 128): (1565, 225, 169)}


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
    num_items,
    num_queries,
    d,
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
    """A tile of items against a tile of queries.

    first, second: int32 [ceil(N / GROUP), M]. The program's excluded pairs are those numbered
    pair_start[program] .. pair_start[program + 1] - 1.
    """
    i_m = tl.program_id(0) % tl.cdiv(num_queries, BLOCK_M)
    i_n = tl.program_id(0) // tl.cdiv(num_queries, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < num_items
    m_m = o_m < num_queries
    p_x = x_ptr + o_n.to(tl.int64)[:, None] * stride_x + o_k[None, :]
    p_q = q_ptr + o_m.to(tl.int64)[None, :] * stride_q + o_k[:, None]
    b_s = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in range(0, d, BLOCK_K):
        # [BLOCK_N, BLOCK_K] items, [BLOCK_K, BLOCK_M] queries
        if EVEN_K:
            b_x = tl.load(p_x + k, mask=m_n[:, None], other=0)
            b_q = tl.load(p_q + k, mask=m_m[None, :], other=0)
        else:
            m_k = k + o_k < d
            b_x = tl.load(p_x + k, mask=m_n[:, None] & m_k[None, :], other=0)
            b_q = tl.load(p_q + k, mask=m_m[None, :] & m_k[:, None], other=0)
        if WIDEN:
            b_x, b_q = b_x.to(tl.float32), b_q.to(tl.float32)
        else:
            b_x = b_x.to(b_q.dtype)
        b_s = tl.dot(b_x, b_q, b_s, input_precision=PRECISION)
    # [BLOCK_N]
    if HAS_MUL:
        b_s = b_s * tl.load(mul_ptr + o_n, mask=m_n, other=0)[:, None]
    if HAS_SUB:
        b_s = b_s - tl.load(sub_ptr + o_n, mask=m_n, other=0)[:, None]
    # Signed integers in the order of the floats; the low bits say which row of the group it is.
    b_i = b_s.to(tl.int32, bitcast=True)
    b_i = b_i ^ ((b_i >> 31) & 0x7FFFFFFF)
    b_i = (b_i & -GROUP) | (o_n % GROUP)[:, None]
    b_i = tl.where(m_n[:, None], b_i, LOWEST)
    if HAS_PAIRS:
        for i_pair in range(
            tl.load(pair_start_ptr + tl.program_id(0)),
            tl.load(pair_start_ptr + tl.program_id(0) + 1),
        ):
            m_row = o_n == tl.load(pair_row_ptr + i_pair)
            m_query = o_m == tl.load(pair_of_ptr + i_pair)
            b_i = tl.where(m_row[:, None] & m_query[None, :], LOWEST, b_i)
    # [groups, GROUP, BLOCK_M]
    b_i = tl.reshape(b_i, [BLOCK_N // GROUP, GROUP, BLOCK_M])
    b_first = tl.max(b_i, axis=1)
    b_second = tl.max(tl.where(b_i == b_first[:, None, :], LOWEST, b_i), axis=1)
    o_g = i_n * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    m_g = (o_g < tl.cdiv(num_items, GROUP))[:, None] & m_m[None, :]
    o_out = o_g.to(tl.int64)[:, None] * num_queries + o_m[None, :]
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


def product_unit(codes: torch.Tensor, d: int) -> float:
    """Relative error, to |q| |x|, of the kernel's scores beyond what ``Queries.unit`` holds."""
    split = _SPLIT_UNIT if codes.dtype == torch.float32 else 0.0
    return (d + 32) * _TENSOR_CORE_UNIT + split + PACK_UNIT


def scan_rows(query: Queries, rows: torch.Tensor, norms: torch.Tensor | None) -> Scanned:
    """What scans the stored rows [N, d] themselves; ``norms`` float32 [N], None: taken here."""
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
    bounded = high <= HUGE
    if query.similarity == "cosine":
        # A zero row scores 0 by the product alone; one too small for float32 has no bound.
        small = (norms < 1 / HUGE) & (rows != 0).any(1)
        bounded = bounded & ~small.any()
        mul = torch.where(norms > 0, norms.reciprocal(), 0.0)
    elif query.similarity == "l2":
        sub = 0.5 * norms * norms
        error = error + unit * (query.norm + high) ** 2
    error = torch.where(bounded, error, float("inf"))
    return Scanned(rows, operand, mul, sub, error)


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
        item_tiles = triton.cdiv(count, config.block_n)
        query_tiles = triton.cdiv(batch, config.block_m)
        num_programs = item_tiles * query_tiles
        program = pair_row // config.block_n * query_tiles + pair_of // config.block_m
        program = torch.where(pair_row < 0, num_programs, program)
        program, order = program.sort()
        every = torch.arange(num_programs + 1, device=codes.device)
        _group_best_kernel[(num_programs,)](
            x_ptr=codes,
            q_ptr=operand,
            mul_ptr=scanned.mul,
            sub_ptr=scanned.sub,
            pair_row_ptr=pair_row[order],
            pair_of_ptr=pair_of[order],
            pair_start_ptr=torch.searchsorted(program, every),
            first_ptr=first,
            second_ptr=second,
            num_items=count,
            num_queries=batch,
            d=operand.shape[1],
            stride_x=codes.stride(0),
            stride_q=operand.stride(0),
            **constants(config, group, operand.shape[1], codes.dtype, scanned, pair_row.numel()),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    def seconds(config: Launch) -> float:
        return triton.testing.do_bench(lambda: launch(config))

    launch(choose(batch, codes.element_size(), codes.device, seconds))
    return first.T.contiguous(), second.T.contiguous()


def constants(
    config: Launch, group: int, d: int, dtype: torch.dtype, scanned: Scanned, pairs: int
) -> dict[str, object]:
    """The compile-time arguments of the kernel."""
    interpreted = triton.knobs.runtime.interpret
    split = dtype == torch.float32 and not interpreted
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": group,
        "EVEN_K": d % config.block_k == 0,
        "HAS_MUL": scanned.mul is not None,
        "HAS_SUB": scanned.sub is not None,
        "HAS_PAIRS": pairs > 0,
        "PRECISION": "bf16x3" if split else "ieee",
        "WIDEN": interpreted,
    }


def group_size(num_rows: int, k: int) -> int:
    """Rows of a group: about sqrt(2 N / k), of the sizes that the kernel has."""
    return GROUPS[num_rows >= 8192 * k]


def unpack(packed: torch.Tensor, group: int) -> torch.Tensor:
    """Scores of packed values, rounded down to the bits that are left; -inf for no row."""
    bits = packed & -group
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.view(torch.float32).masked_fill(packed == LOWEST.value, float("-inf"))


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
    others |= dict.fromkeys(("num_items", "num_queries", "d", "stride_x", "stride_q"), "i32")
    found = []
    for (dtype, (codes, operand)), backend in itertools.product(types.items(), ("cuda", "hip")):
        launches = [
            (batch, config)
            for batch in (16, 64, 1024)
            for config in candidates(batch, dtype.itemsize, backend)
        ]
        for (batch, config), group in itertools.product(launches, GROUPS):
            given = {"x_ptr": codes, "q_ptr": operand, **others}
            arguments = _group_best_kernel.arg_names
            found.append(
                {
                    "name": "topk.group_best",
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
                    "aligned": ("stride_x", "stride_q", "d"),
                    "work": _work(config, group, batch, dtype.itemsize),
                    "budget": _budget(config, group, dtype.itemsize),
                }
            )
    return found


def _work(config: Launch, group: int, batch: int, itemsize: int) -> dict[str, Any]:
    """What a tile of ``aot_configs`` needs, for rows of ``_AOT_WIDTH`` columns."""
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    sharing = triton.cdiv(batch, block_m)  # tiles of queries; all but one find the items in cache
    return {
        "sizes": f"B={batch} d={_AOT_WIDTH}",
        "steps": _AOT_WIDTH // block_k,
        "bytes": block_n * block_k * itemsize / sharing,
        "flops": 2 * block_m * block_n * block_k,
        "scores": block_m * block_n,
        # mul and sub of an item, first and second of a group
        "tile_bytes": 8 * block_n / sharing + 8 * block_m * block_n / group,
    }


def _budget(config: Launch, group: int, itemsize: int) -> dict[str, Any]:
    """What the code of a configuration must hold; nothing for one that has no numbers yet."""
    if (itemsize, config.block_m) not in _LOOP_BUDGET:
        return {}
    epilogue, shuffles, shared = _EPILOGUE_BUDGET[config.block_m, group]
    return {
        "loop": _LOOP_BUDGET[itemsize, config.block_m],
        "epilogue_per_1024_scores": epilogue * 1024 / (config.block_m * config.block_n),
        "epilogue_shuffles": shuffles,
        "epilogue_shared": shared,
        "load_bits": 64 if itemsize == 1 else 128,
        "wgmma": True,
    }
