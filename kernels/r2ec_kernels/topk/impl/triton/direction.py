"""The direction that the rows of a plain table share, as the states of a language model do.

With c of length 1, any positive a and any t, a (q . x) - t = (a q - c) . x + (c . x - t) for every
row. The scan multiplies o = a q - c, as its type holds it, and adds c . x - t, which it takes with
the norms; scores keep the order of q . x. Its error is relative to |o|, not to |a q|, and what the
type misses of o counts for |x - t c|, because its product with t c is the same for all rows. Where
rows and queries share c, both are a fifth at a cosine of 0.96 between rows.

c is the direction of the mean of some rows and t their usual c . x (cosine: of x / |x|); both are 0
where rows share little.

Grid: one program. Reads 4 d bytes, writes 4 d. Numerics: float32; any c and t give exact results.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from ...._numbers import HUGE, UNIT
from ...._scan.triton_queries import DeviceQueries, prepare_on_device
from .groups import Scanned, operand_type, scan_rows

_HUGE = tl.constexpr(HUGE)
_SAMPLE = 1024  # rows, about, evenly over the table
_SHARED = tl.constexpr(0.5)  # of the rows' squares, from which on a mean counts
_BLOCK_D = 1024


@triton.jit
def _direction_kernel(
    mean_ptr, size_ptr, out_ptr, num_rows, d, COSINE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out float32 [d + 1]: c and t, of the mean [d] of num_rows rows. size: float32 [], the root of
    the rows' squares."""
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_D]
    b_square = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, d, BLOCK_D):
        b_mean = tl.load(mean_ptr + first + o_d, mask=first + o_d < d, other=0.0)
        b_square += b_mean * b_mean
    square, size = tl.sum(b_square, axis=0), tl.load(size_ptr)
    # comparisons with NaN are false
    counts = (size <= _HUGE) & (square * num_rows >= size * size * _SHARED)
    counts = counts & (square >= 1.0 / _HUGE)
    scale = 1.0 / tl.sqrt(tl.where(counts, square, 1.0))
    for first in range(0, d, BLOCK_D):
        b_mean = tl.load(mean_ptr + first + o_d, mask=first + o_d < d, other=0.0)
        b_out = tl.where(counts, b_mean * scale, 0.0)
        tl.store(out_ptr + first + o_d, b_out, mask=first + o_d < d)
    middle = tl.sqrt(square)
    if COSINE:  # beside the usual length of a row
        middle = tl.sqrt(square * num_rows) / tl.where(counts, size, 1.0)
    tl.store(out_ptr + d, tl.where(counts, middle, 0.0))


def shared_direction(rows: torch.Tensor, similarity: str) -> torch.Tensor:
    """c and t of rows [N, d], float32 [d + 1]: four device operations, and no wait."""
    count, d = rows.shape
    out = torch.zeros(d + 1, dtype=torch.float32, device=rows.device)
    if count:
        sample = rows[:: max(1, count // _SAMPLE)]
        _direction_kernel[(1,)](
            mean_ptr=sample.mean(0, dtype=torch.float32),
            size_ptr=torch.linalg.vector_norm(sample, dtype=torch.float32),
            out_ptr=out,
            num_rows=sample.shape[0],
            d=d,
            COSINE=similarity == "cosine",
            BLOCK_D=_BLOCK_D,
            num_warps=4,
        )
    return out


def prepare_rows(
    rows: torch.Tensor, queries: torch.Tensor, similarity: str, temperature: float
) -> tuple[Scanned, DeviceQueries]:
    """What scans rows [N, d] themselves for queries [B, <= d], without their common direction."""
    scanned = scan_rows(rows, similarity)
    if similarity != "l2":
        scanned = replace(scanned, direction=shared_direction(scanned.codes, similarity))
    settings = similarity, temperature, operand_type(scanned.codes)
    mean, width = scanned.direction, scanned.codes.shape[1]
    return scanned, prepare_on_device(queries, *settings, mean=mean, width=width)


def added_unit(d: int) -> float:
    """Error of a score beside that of the product with o and of packing, relative to (|a q| + 1)
    |x|: sums of at most d / 16 steps of at most 128 terms, for c . x and a norm; a dozen roundings.
    """
    return 1.02 * (1.5 * (d / 16 + 128) + 12) * UNIT


def aot_configs() -> list[dict[str, Any]]:
    """The kernel's configuration, for ahead-of-time compilation (``r2ec_kernels.aot``)."""
    names = _direction_kernel.arg_names
    kinds = {n: "*fp32" if n.endswith("_ptr") else "i32" for n in names}
    return [
        {
            "name": "topk.direction",
            "kernel": _direction_kernel,
            "signature": kinds | dict.fromkeys(("COSINE", "BLOCK_D"), "constexpr"),
            "constexprs": {"COSINE": True, "BLOCK_D": _BLOCK_D},
            "num_warps": 4,
            "num_stages": 1,
            "uses_tensor_cores": False,
            "work": {"sizes": "d=1024", "bytes": 8 * _BLOCK_D, "flops": 0, "straight": True},
            "budget": {"loop": 300},
        }
    ]
