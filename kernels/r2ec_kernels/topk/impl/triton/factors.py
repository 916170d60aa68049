"""What turns products into scores, a row each, ahead of a scan of many tiles of queries.

For rows x_n of a table, with their norms and what a copy's codes bring along,

    score = product mul[n] - sub[n]        cosine: mul = 1 / |x_n|;  l2: sub = |x_n|^2 / 2

so that the scan has one multiplication and one subtraction a score, and no division. mul and sub
end with a whole tile of the scan: it loads them without a mask.

Grid: parts of the rows. Tile: [BLOCK_N] rows, in steps of BLOCK_K columns where norms are taken.
Reads 4 to 8 bytes a row, writes as much; where norms are taken it reads the table, N d elements,
and makes 2 N d FLOPs. Numerics: float32.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...._numbers import HUGE
from .groups import Scanned

_HUGE = tl.constexpr(HUGE)
_BLOCK_ROWS = 1024  # of a program that takes no norms
_NORM_ROWS, _NORM_COLUMNS = 64, 128  # of a tile of one that does
# Of ``aot --budget``, on sm_90: what the code holds, 3 to 5% above.
_BUDGET = {
    ("bf16", True): {"loop": 152, "load_bits": 128, "registers": 128},
    ("fp32", True): {"loop": 155, "load_bits": 128},
    ("fp32", False): {"loop": 241},
}


@triton.jit
def norm_bound(
    b_norm,
    m_n,
    p_x,
    d,
    BY_NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Norms as bounds [BLOCK_N]: infinite for a row whose score has none.

    p_x: [BLOCK_N, BLOCK_K], where the rows begin.
    """
    b_bound = tl.where(b_norm <= _HUGE, b_norm, float("inf"))
    if BY_NORM == "cosine":
        # A zero row scores 0 by the product alone; one too small for float32 has no bound.
        m_small = m_n & (b_norm < 1.0 / _HUGE)
        if tl.sum(m_small.to(tl.int32), axis=0) > 0:
            b_largest = tl.zeros([BLOCK_N], dtype=tl.float32)
            for k in range(0, d, BLOCK_K):
                m_k = k + tl.arange(0, BLOCK_K) < d
                b_x = tl.load(p_x + k, mask=m_n[:, None] & m_k[None, :], other=0)
                b_largest = tl.maximum(b_largest, tl.max(tl.abs(b_x.to(tl.float32)), axis=1))
            b_bound = tl.where(m_small & (b_largest > 0), float("inf"), b_bound)
    return b_bound


@triton.jit
def inverse_norm(b_norm):
    """1 / norm; 0 for a zero row, and for one that is not there."""
    return tl.where(b_norm > 0, 1.0 / tl.where(b_norm > 0, b_norm, 1.0), 0.0)


@triton.jit
def distance_bound(b_square, b_along, middle, d, m_n):
    """Bounds [BLOCK_N] of rows' distances from t c (``direction``).

    b_square, b_along: |x|^2 and c . x, as sums in float32. middle: t.
    """
    b_far = tl.maximum(b_square - 2.0 * middle * b_along + middle * middle, 0.0)
    unit = (d * 0.0625 + 140.0) * (2.0**-21)
    b_far = tl.sqrt(b_far + unit * (b_square + middle * middle)) * 1.001
    return tl.where(m_n, b_far, 0.0)


@triton.jit
def _factors_kernel(
    x_ptr,
    norm_ptr,
    given_mul_ptr,
    given_sub_ptr,
    along_ptr,
    mul_ptr,
    sub_ptr,
    tile_norm_ptr,
    num_items,
    padded,
    d,
    stride_x,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_MUL: tl.constexpr,
    HAS_SUB: tl.constexpr,
    BY_NORM: tl.constexpr,
    TAKE_NORM: tl.constexpr,
    HAS_ALONG: tl.constexpr,
):
    """mul, sub: float32 [padded]; those that change nothing are not written. TAKE_NORM: take the
    norms of x [N, d], and write the largest of a tile, as a bound, to tile_norm [3, tiles] as
    ``Scanned.limits``. HAS_ALONG: c . x - t is part of the score; along: float32 [d + 1]."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < num_items
    b_mul = tl.full([BLOCK_N], 1.0, tl.float32)
    b_sub = tl.zeros([BLOCK_N], tl.float32)
    if TAKE_NORM:
        o_k = tl.arange(0, BLOCK_K)
        p_x = x_ptr + o_n.to(tl.int64)[:, None] * stride_x + o_k[None, :]
        # [BLOCK_N, BLOCK_K]
        b_square = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        b_along = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        for k in range(0, d, BLOCK_K):
            b_x = tl.load(p_x + k, mask=m_n[:, None] & (k + o_k < d)[None, :], other=0)
            b_x = b_x.to(tl.float32)
            b_square += b_x * b_x
            if HAS_ALONG:
                b_c = tl.load(along_ptr + k + o_k, mask=k + o_k < d, other=0)
                b_along += b_x * b_c[None, :]
        b_norm = tl.sqrt(tl.sum(b_square, axis=1))
        b_bound = norm_bound(b_norm, m_n, p_x, d, BY_NORM, BLOCK_N, BLOCK_K)
        p_limit = tile_norm_ptr + tl.program_id(0)
        tl.store(p_limit + 2 * tl.num_programs(0), tl.max(b_bound, axis=0))
    elif BY_NORM != "none":
        b_norm = tl.load(norm_ptr + o_n, mask=m_n, other=0)
    if BY_NORM == "cosine":
        b_mul = inverse_norm(b_norm)
    elif BY_NORM == "l2":
        b_sub = 0.5 * b_norm * b_norm
    if HAS_ALONG:
        b_c = tl.sum(b_along, axis=1) * b_mul
        b_length = b_norm * b_mul  # cosine: of rows at length 1
        middle = tl.load(along_ptr + d)
        b_far = distance_bound(b_length * b_length, b_c, middle, d, m_n)
        tl.store(p_limit, tl.max(b_far, axis=0))
        b_sub = middle - b_c
    if HAS_MUL:
        b_given = tl.load(given_mul_ptr + o_n, mask=m_n, other=0)
        b_mul, b_sub = b_mul * b_given, b_sub * b_given
    if HAS_SUB:
        b_sub += tl.load(given_sub_ptr + o_n, mask=m_n, other=0)
    if HAS_MUL or BY_NORM == "cosine":
        tl.store(mul_ptr + o_n, b_mul, mask=o_n < padded)
    if HAS_SUB or HAS_ALONG or BY_NORM == "l2":
        tl.store(sub_ptr + o_n, b_sub, mask=o_n < padded)


class Factors(NamedTuple):
    """mul, sub: float32 [N, and rows behind], or None where they change nothing; limits: float32
    [3] as ``Scanned.limits``; some_off: as there."""

    mul: torch.Tensor | None
    sub: torch.Tensor | None
    limits: torch.Tensor
    some_off: bool


def row_factors(scanned: Scanned, d: int, tile: int) -> Factors:
    """The factors of a scan in tiles of ``tile`` rows, its codes being d columns wide."""
    codes, by_norm = scanned.codes, scanned.by_norm
    count, device = codes.shape[0], codes.device
    padded = triton.cdiv(count, tile) * tile
    needs_mul = scanned.mul is not None or by_norm == "cosine"
    needs_sub = scanned.sub is not None or by_norm == "l2" or scanned.direction is not None
    if scanned.limits is not None and not (needs_mul or needs_sub):
        return Factors(None, None, scanned.limits, scanned.some_off)
    mul = torch.empty(padded, dtype=torch.float32, device=device) if needs_mul else None
    sub = torch.empty(padded, dtype=torch.float32, device=device) if needs_sub else None
    taken = scanned.takes_norms
    block = _NORM_ROWS if taken else _BLOCK_ROWS
    programs = triton.cdiv(padded, block)
    tile_norms = torch.zeros(3, programs, dtype=torch.float32, device=device) if taken else None
    _factors_kernel[(programs,)](
        x_ptr=codes if taken else None,
        norm_ptr=scanned.norms,
        given_mul_ptr=scanned.mul,
        given_sub_ptr=scanned.sub,
        along_ptr=scanned.direction,
        mul_ptr=mul,
        sub_ptr=sub,
        tile_norm_ptr=tile_norms,
        num_items=count,
        padded=padded,
        d=d,
        stride_x=codes.stride(0),
        BLOCK_N=block,
        BLOCK_K=_NORM_COLUMNS,
        HAS_MUL=scanned.mul is not None,
        HAS_SUB=scanned.sub is not None,
        BY_NORM=by_norm,
        TAKE_NORM=taken,
        HAS_ALONG=scanned.direction is not None,
        num_warps=_warps(scanned.direction is not None),
    )
    return Factors(mul, sub, limits_of(scanned, tile_norms), scanned.some_off)


def _warps(has_along: bool) -> int:
    """Registers hold a second sum for every column of a tile with a direction."""
    return 8 if has_along else 4


def limits_of(scanned: Scanned, tile_norms: torch.Tensor | None) -> torch.Tensor:
    """``Scanned.limits``, from those of tiles [3, tiles] where they were taken."""
    if scanned.limits is not None:
        return scanned.limits
    assert tile_norms is not None
    return tile_norms.amax(1)


def aot_configs() -> list[dict[str, Any]]:
    """The kernel's configurations, for ahead-of-time compilation (``r2ec_kernels.aot``)."""
    kinds = dict.fromkeys((n for n in _factors_kernel.arg_names if n.endswith("_ptr")), "*fp32")
    found = []
    for kind, by_norm, taken in (
        ("bf16", "cosine", True),
        ("fp32", "l2", True),
        ("fp32", "cosine", False),
    ):
        rows = _NORM_ROWS if taken else _BLOCK_ROWS
        constants = {"BLOCK_N": rows, "BLOCK_K": _NORM_COLUMNS, "BY_NORM": by_norm}
        constants |= {"HAS_MUL": not taken, "HAS_SUB": not taken, "TAKE_NORM": taken}
        constants |= {"HAS_ALONG": taken and by_norm != "l2"}
        types = kinds | {"x_ptr": f"*{kind}"}
        names = _factors_kernel.arg_names
        size = 2 if kind == "bf16" else 4
        work: dict[str, Any] = {"sizes": "d=1024", "steps": 1024 // _NORM_COLUMNS}
        work |= {"bytes": rows * _NORM_COLUMNS * size, "flops": 2 * rows * _NORM_COLUMNS}
        if not taken:
            work = {"sizes": "a row", "bytes": rows * 20, "flops": 4 * rows, "straight": True}
        found.append(
            {
                "name": "topk.factors",
                "kernel": _factors_kernel,
                "signature": {
                    n: "constexpr" if n in constants else types.get(n, "i32") for n in names
                },
                "constexprs": constants,
                "num_warps": _warps(bool(constants["HAS_ALONG"])),
                "num_stages": 3,
                "uses_tensor_cores": False,
                "aligned": ("stride_x", "d"),
                "work": work,
                "budget": _BUDGET[kind, taken],
            }
        )
    return found
