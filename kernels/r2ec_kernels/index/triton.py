"""The Triton scan of an index's low-precision copy."""

import torch

from .._exact.bounds import Queries
from ..topk.impl.triton_kernels import PACK_UNIT, Scanned, product_unit
from .quantize import ScanCopy, padded


def scan_codes(query: Queries, copy: ScanCopy[torch.Tensor], mean: torch.Tensor) -> Scanned:
    """What scans the live rows of a low-precision copy."""
    codes = copy.codes[: len(copy.bounded)]
    exact = query.exact()
    if query.similarity == "l2":
        exact = exact - mean
    exact = padded(exact)
    operand = exact.bfloat16()
    norm = torch.linalg.vector_norm(exact, dim=1)
    missed = torch.linalg.vector_norm(exact - operand.double(), dim=1)
    residual, size, high = copy.residual.max(), copy.size.max(), copy.norm.max()
    unit = product_unit(codes, exact.shape[1]) + query.unit
    error = norm * residual + (missed + unit * (norm + missed)) * size
    if query.similarity == "l2":
        error = error + (2.0**-21 + PACK_UNIT) * (norm + size + residual) ** 2
    error = 1.01 * error.float() + query.product_error(high * 1.001)
    error = torch.where(copy.bounded.all(), error, float("inf"))
    mul = copy.scale if codes.dtype == torch.int8 else None
    sub = copy.half if query.similarity == "l2" else None
    return Scanned(codes, operand, mul, sub, error)
