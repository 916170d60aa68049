"""Queries prepared for a tensor-core scan, in one kernel: what it multiplies, and their bounds.

For queries Q [M, d] it computes, with s_m the power of two that brings |q_m| near 1 ("l2": 1;
where q_m shares the direction of a mean of length 1: what brings their product to 1),

    operand = round(s q - mean)          in the scan's type, zero columns behind
    norm, held, missed = |s q|, |s q - mean|, |s q - mean - operand|
    floor                                 the absolute part of the error (``_exact.bounds``)

A query whose norm float32 cannot hold has operand and norms 0 and an infinite floor.

Grid: a program a query. Tile: [BLOCK_D] columns, twice over the query. Reads 2 M d elements, writes
M d and 16 M bytes. Numerics: float64, rounded once.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .._exact.bounds import float32_unit
from .._exact.triton_scores import float64_bits, float64_of
from .._numbers import HUGE

_HUGE = tl.constexpr(HUGE)
_BLOCK_D = 512
_SHARES = tl.constexpr(4.0)  # cosines from 1/4 on: a scaled query is no longer than 4


@triton.jit
def fits_float32(norm, temperature):
    """Whether float32 can hold what comes of a query of this norm; both float64."""
    fits = (norm <= _HUGE) & ((norm >= 1.0 / _HUGE) | (norm == 0))
    return fits & (temperature <= _HUGE) & (temperature >= 1.0 / _HUGE)


@triton.jit
def scale_of(norm, fits, SIMILARITY: tl.constexpr):
    """2^-floor(log2 norm), by its exponent: float64; 1 for l2, and where nothing fits."""
    scale = norm * 0.0 + 1.0
    if SIMILARITY != "l2":
        safe = tl.where(fits & (norm > 0), norm, 1.0)
        exponent = (safe.to(tl.int64, bitcast=True) >> 52) - 1023
        scale = ((1023 - exponent) << 52).to(tl.float64, bitcast=True)
    return tl.where(fits, scale, 1.0)


@triton.jit
def _prepare_kernel(
    q_ptr,
    mean_ptr,
    operand_ptr,
    low_ptr,
    bounds_ptr,
    num_queries,
    d,
    width,
    stride_q,
    temperature,
    SIMILARITY: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_LOW: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One query. operand, low: [M, width]; bounds: float32 [4, M], norm, held, missed and floor."""
    i_m = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_D]
    b_square = tl.zeros([BLOCK_D], tl.float64)
    b_along = tl.zeros([BLOCK_D], tl.float64)
    for first in range(0, d, BLOCK_D):
        b_q = tl.load(q_ptr + i_m * stride_q + first + o_d, mask=first + o_d < d, other=0.0)
        b_q = b_q.to(tl.float64)
        b_square += b_q * b_q
        if HAS_MEAN and SIMILARITY != "l2":
            b_mean = tl.load(mean_ptr + first + o_d, mask=first + o_d < d, other=0.0)
            b_along += b_q * b_mean.to(tl.float64)
    norm = tl.sqrt(tl.sum(b_square, axis=0))
    temperature = float64_of(temperature)
    fits = fits_float32(norm, temperature)
    scale = scale_of(norm, fits, SIMILARITY)
    if HAS_MEAN and SIMILARITY != "l2":
        along = tl.sum(b_along, axis=0)
        shares = fits & (norm > 0) & (along * _SHARES >= norm)
        scale = tl.where(shares, 1.0 / tl.where(shares, along, 1.0), scale)
    b_held = tl.zeros([BLOCK_D], tl.float64)
    b_missed = tl.zeros([BLOCK_D], tl.float64)
    for first in range(0, width, BLOCK_D):
        m_d = first + o_d < d
        b_q = tl.load(q_ptr + i_m * stride_q + first + o_d, mask=m_d, other=0.0).to(tl.float64)
        b_exact = tl.where(fits, b_q * scale, 0.0)
        if HAS_MEAN:
            b_exact -= tl.load(mean_ptr + first + o_d, mask=m_d, other=0.0).to(tl.float64)
        b_operand = b_exact.to(tl.float32).to(operand_ptr.dtype.element_ty)
        tl.store(operand_ptr + i_m * width + first + o_d, b_operand, mask=first + o_d < width)
        b_rest = b_exact - b_operand.to(tl.float32).to(tl.float64)
        if HAS_LOW:
            b_low = b_rest.to(tl.float32).to(operand_ptr.dtype.element_ty)
            tl.store(low_ptr + i_m * width + first + o_d, b_low, mask=first + o_d < width)
            b_rest -= b_low.to(tl.float32).to(tl.float64)
        b_held += b_exact * b_exact
        b_missed += b_rest * b_rest
    # The canonical score rounds to a multiple of 2^-149, and products may be flushed to zero.
    flushed = d * (2.0**-126)
    rounded = temperature * (2.0**-74) * (2.0**-74)
    flushed = flushed * (2.0 * _HUGE if SIMILARITY == "cosine" else 4.0)
    rounded = rounded * (4.0 * _HUGE if SIMILARITY == "l2" else 2.0)
    floor = flushed + rounded * tl.where(scale > 1.0, scale, 1.0)
    p_out = bounds_ptr + i_m
    tl.store(p_out, tl.where(fits, norm * scale * 1.01, 0.0).to(tl.float32))
    tl.store(p_out + num_queries, (tl.sqrt(tl.sum(b_held, axis=0)) * 1.001).to(tl.float32))
    tl.store(p_out + 2 * num_queries, (tl.sqrt(tl.sum(b_missed, axis=0)) * 1.001).to(tl.float32))
    tl.store(p_out + 3 * num_queries, tl.where(fits, floor, float("inf")).to(tl.float32))


@dataclass(frozen=True)
class DeviceQueries:
    """A batch prepared on the device.

    Attributes:
        original: [B, d], as given, columns side by side.
        operand: [B, width >= d], what the scan multiplies.
        low: the same of what the operand misses, or None.
        bounds: float32 [4, B]: norm, held, missed, floor.
        similarity, temperature: of the search.
        unit: relative error of a float32 product of the rows, canonical rounding included.
    """

    original: torch.Tensor
    operand: torch.Tensor
    low: torch.Tensor | None
    bounds: torch.Tensor
    similarity: str
    temperature: float
    unit: float

    def __len__(self) -> int:
        return self.original.shape[0]

    @property
    def temperature_bits(self) -> int:
        """The temperature as kernels take it."""
        return float64_bits(self.temperature)

    def part(self, start: int, stop: int) -> "DeviceQueries":
        """The queries start .. stop - 1."""
        return DeviceQueries(
            self.original[start:stop],
            self.operand[start:stop],
            None if self.low is None else self.low[start:stop],
            self.bounds[:, start:stop],
            self.similarity,
            self.temperature,
            self.unit,
        )


def prepare_on_device(
    queries: torch.Tensor,
    similarity: str,
    temperature: float,
    dtype: torch.dtype,
    *,
    mean: torch.Tensor | None = None,
    width: int | None = None,
    low: bool = False,
) -> DeviceQueries:
    """Prepare a batch [B, d] for a scan that multiplies ``dtype``.

    mean: [d] or wider, subtracted from the scaled queries, of any length for "l2", else of length 1
    or 0; width: columns of the operand (d); low:
    also what the operand misses.
    """
    queries = queries if queries.stride(-1) == 1 else queries.contiguous()
    batch, d = queries.shape
    width = d if width is None else width
    operand = torch.empty(batch, width, dtype=dtype, device=queries.device)
    rest = torch.empty_like(operand) if low else None
    bounds = torch.empty(4, batch, dtype=torch.float32, device=queries.device)
    if batch:
        _prepare_kernel[(batch,)](
            q_ptr=queries,
            mean_ptr=mean,
            operand_ptr=operand,
            low_ptr=rest,
            bounds_ptr=bounds,
            num_queries=batch,
            d=d,
            width=width,
            stride_q=queries.stride(0),
            temperature=float64_bits(temperature),
            SIMILARITY=similarity,
            HAS_MEAN=mean is not None,
            HAS_LOW=low,
            BLOCK_D=min(_BLOCK_D, triton.next_power_of_2(max(1, width))),
            num_warps=4,
        )
    unit = float32_unit(d, similarity)
    return DeviceQueries(queries, operand, rest, bounds, similarity, temperature, unit)


def aot_configs() -> list[dict[str, Any]]:
    """The kernel's configurations, for ahead-of-time compilation (``r2ec_kernels.aot``)."""
    found = []
    for given, operand, similarity, mean in (
        ("fp32", "bf16", "l2", "fp64"),
        ("fp32", "bf16", "cosine", "fp32"),
        ("fp32", "fp32", "cosine", None),
        ("bf16", "bf16", "cosine", None),
        ("fp16", "fp16", "dot", None),
    ):
        kinds = {
            "q_ptr": f"*{given}",
            "mean_ptr": f"*{mean or 'fp64'}",
            "operand_ptr": f"*{operand}",
        }
        kinds |= {"low_ptr": f"*{operand}", "bounds_ptr": "*fp32", "temperature": "i64"}
        constants = {
            "SIMILARITY": similarity,
            "HAS_MEAN": mean is not None,
            "HAS_LOW": not mean,
            "BLOCK_D": _BLOCK_D,
        }
        names = _prepare_kernel.arg_names
        found.append(
            {
                "name": "scan.prepare",
                "kernel": _prepare_kernel,
                "signature": {
                    n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names
                },
                "constexprs": constants,
                "num_warps": 4,
                "num_stages": 1,
                "uses_tensor_cores": False,
                "work": _work(given, operand, not mean),
                "budget": {"loop": 124, "epilogue": 500},
            }
        )
    return found


def _work(given: str, operand: str, low: bool) -> dict[str, Any]:
    """What a query of two blocks of columns needs; the second reading is from cache."""
    size = {"fp32": 4}
    written = size.get(operand, 2) * (1 + low)
    moved = _BLOCK_D * (size.get(given, 2) + written)
    return {"sizes": f"d={2 * _BLOCK_D}", "steps": 2, "bytes": moved, "flops": 0}
