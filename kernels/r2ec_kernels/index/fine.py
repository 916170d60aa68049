"""Codes of two int8 numbers, 16 bits a column: what an index reads ranks and log-probabilities from
where AMX tiles multiply int8.

The first number is that of the int8 copy, the second (the kind "fine") what it misses, in
``LOW_PARTS`` steps:

    y - mu ~ scale (code + low / LOW_PARTS),    g' = scale step (code . q' + low . q' / LOW_PARTS)

with int16 queries q' (``products``): two exact integer sums and six roundings. Errors are 1/250 of
the int8 copy's and about 1/30 of bfloat16's: hardly a row is left to re-score. The C++ extension
ranks and sums while it makes the scores. It reads 2 bytes a column, 4 N B d operations.
"""

from dataclasses import dataclass, replace

import torch

from .._cpu import extension
from .._exact.bounds import Queries
from .code_scan import CodeBounds
from .products import PRODUCTS
from .quantize import UP, Limits, ScanCopy, centre, padded

KIND, COARSE_KIND = "fine", "int8"
# exact sums, and six roundings: of each sum, their weighted sum, the step, and times step and scale
_PRODUCT = replace(PRODUCTS[COARSE_KIND][0], name="2 int8 x int16", unit=2.0**-21)


@dataclass(frozen=True)
class FineCopy(ScanCopy[torch.Tensor]):
    """The int8 copy with its second codes ``low``, int8, shaped as ``codes``; residual and size are
    of both codes together."""

    low: torch.Tensor


def refine(
    rows: torch.Tensor, coarse: dict[str, torch.Tensor], similarity: str, mean: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The second codes of rows [n, d] beside their ``coarse`` ones (``quantize.encode``): code int8
    [n, d padded]; residual and size float32 [n], of both codes together."""
    exact, _ = centre(rows, similarity, mean)
    high = coarse["code"][:, : rows.shape[1]].double()
    scale = coarse["scale"].double()[:, None]
    low = ((exact / scale - high) * extension.LOW_PARTS).round().clamp(-127, 127)
    held = (high + low / extension.LOW_PARTS) * scale
    return {
        "code": padded(low.to(torch.int8)),
        "residual": (torch.linalg.vector_norm(exact - held, dim=1) * UP).float(),
        "size": (torch.linalg.vector_norm(held, dim=1) * UP).float(),
    }


class FineScan(CodeBounds):
    """The ``rank.impl.torch.FusedScan`` over both codes, for dot and cosine."""

    def __init__(self, copy: FineCopy, limits: Limits, mean: torch.Tensor, query: Queries) -> None:
        super().__init__(limits, mean, _PRODUCT, query)
        self.copy = copy

    def stats(self, targets: extension.RankTargets, most_near: int) -> extension.Stats:
        copy = self.copy
        queries, step = self.operand.value
        codes = extension.Codes(
            codes=copy.codes,
            num_rows=len(copy.bounded),
            scale=copy.scale,
            half=None,
            bounded=None if self.limits.bounded else copy.bounded,
            queries=queries,
            step=step,
            error=self.error,
        )
        return extension.code_stats(codes, copy.low, targets, most_near)
