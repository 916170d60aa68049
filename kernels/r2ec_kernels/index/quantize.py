"""Scan copies: low-precision centred copies of a table, and what their scores may be off by.

A row x is stored as a code of y - mu, where y is x (cosine: x / |x|) and mu the mean of all y when
the index was built: the mean adds one constant to all scores of a query, and without it the code
spends its bits on what differs between rows. Kept beside the code: the norm of what it misses
(``residual``) and of what it holds (``size``). With q' the query as the product uses it,

    |q.(y - mu) - q'.code| <= |q| residual + |q - q'| size + (error of the product) |q'| size.

A product that returns bfloat16 rounds a finished float32 sum: that error is relative to the score,
which is far below |q'| size, and is bounded by the largest score of a block.

Bytes: d padded to DIM_MULTIPLE, 2 (fp16, bf16) or 1 (int8) a column, and 21 a row beside. Encoding
is float64, O(n d), by blocks; bounds are float64, rounded up to float32.
"""

from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from .._numbers import HUGE

DIM_MULTIPLE = 64  # columns of a code, beside GROUP rows; padded with zeros
UP = 1.0 + 2.0**-20  # a float64 bound stays one after rounding to float32

C = TypeVar("C")  # codes [n, d padded]: a tensor, or fbgemm.PackedCodes


@dataclass(frozen=True)
class ScanCopy(Generic[C]):
    """The live rows of one low-precision copy.

    Attributes:
        codes: float16, bfloat16 or int8 [n or more, d padded]; whole groups of rows.
        scale, residual, size, half, bounded: [n], see ``encode``.
        norm: float32 [n], of the rows themselves.
    """

    codes: C
    scale: torch.Tensor
    residual: torch.Tensor
    size: torch.Tensor
    half: torch.Tensor
    bounded: torch.Tensor
    norm: torch.Tensor


def encode(
    rows: torch.Tensor, kind: str, similarity: str, mean: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Codes of rows [n, d]: the tensors of an index's low-precision copy.

    code float16, bfloat16 or int8 [n, d padded]; float32 [n]: scale, residual, size, and half
    (|y - mu|^2 / 2, for l2); bounded bool [n]: False where float32 cannot hold the numbers (such a
    row's code is 0).
    """
    exact, bounded = centre(rows, similarity, mean)
    if kind == "bf16":
        code = exact.bfloat16()
        scale = torch.ones(rows.shape[0], device=rows.device)
    elif kind == "fp16":
        scale = _half_scale(exact.abs().amax(1))
        code = (exact / scale[:, None]).half()
    else:
        scale = (exact.abs().amax(1) / 127).float()
        scale = torch.where(scale == 0, 1.0, scale)
        code = (exact / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    held = code.double() * scale.double()[:, None]
    return {
        "code": padded(code),
        "scale": scale,
        "residual": (torch.linalg.vector_norm(exact - held, dim=1) * UP).float(),
        "size": (torch.linalg.vector_norm(held, dim=1) * UP).float(),
        "half": (0.5 * exact.square().sum(1)).float(),
        "bounded": bounded,
    }


def _half_scale(largest: torch.Tensor) -> torch.Tensor:
    """A power of two [n] by which rows with these largest entries are divided before float16 holds
    them: 1 where they lie well inside its normal range."""
    power = torch.exp2(torch.floor(torch.log2(largest)))
    inside = (largest == 0) | ((largest >= 2.0**-6) & (largest < 2.0**14))
    return torch.where(inside, 1.0, power).float()


def padded(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [n, d] with zero columns up to a multiple of DIM_MULTIPLE."""
    return torch.nn.functional.pad(vectors, (0, -vectors.shape[1] % DIM_MULTIPLE))


def mean_row(rows: torch.Tensor, similarity: str) -> torch.Tensor:
    """The mean of y over bounded rows, float64 [d], by blocks."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for block in rows.split(4096):
        total += centre(block, similarity, torch.zeros_like(total))[0].sum(0)
    return total / max(1, rows.shape[0])


def centre(
    rows: torch.Tensor, similarity: str, mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What codes of rows [n, d] stand for: y - mu float64 [n, d]; bounded bool [n]."""
    exact = rows.double()
    norms = torch.linalg.vector_norm(exact, dim=1)
    bounded = norms <= HUGE
    if similarity == "cosine":
        bounded &= (norms >= 1 / HUGE) | (norms == 0)
        exact = exact / torch.where(norms == 0, 1.0, norms)[:, None]
    return torch.where(bounded[:, None], exact - mean, 0.0), bounded


class Limits(NamedTuple):
    """What a scan has to know of all rows of a copy.

    Attributes:
        residual, size, norm: float32 [], the largest of bounded rows.
        typical_residual: float32 [], the root of their mean square.
        bounded: whether all rows are.
        scaled: whether some row's scale is not 1.
        of_scan: float32 [3], residual, size and norm, the norm infinite unless all rows are
            bounded: what a scan on a GPU reads.
    """

    residual: torch.Tensor
    size: torch.Tensor
    norm: torch.Tensor
    typical_residual: torch.Tensor
    bounded: bool
    scaled: bool
    of_scan: torch.Tensor

    @classmethod
    def of(cls, copy: ScanCopy[Any]) -> "Limits":
        residual, size, norm = (
            torch.where(copy.bounded, field, 0.0) for field in (copy.residual, copy.size, copy.norm)
        )
        largest = residual.max(), size.max(), norm.max()
        bounded = bool(copy.bounded.all())
        shown = largest[2] if bounded else torch.full_like(largest[2], torch.inf)
        return cls(
            residual=largest[0],
            size=largest[1],
            norm=largest[2],
            typical_residual=residual.square().mean().sqrt(),
            bounded=bounded,
            scaled=bool(copy.scale.ne(1).any()),
            of_scan=torch.stack([*largest[:2], shown]),
        )

    @classmethod
    def of_rows(cls, rows: torch.Tensor, norms: torch.Tensor, similarity: str) -> "Limits":
        """Of rows that are scanned themselves; norms: float32 [n]."""
        high = norms.max()
        bounded = high <= HUGE
        if similarity == "cosine":
            small = norms < 1 / HUGE
            bounded &= ~((rows[small] != 0).any())
        zero = torch.zeros_like(high)
        shown = torch.where(bounded, high, torch.inf)
        return cls(zero, high, high, zero, bool(bounded), False, torch.stack([zero, high, shown]))
