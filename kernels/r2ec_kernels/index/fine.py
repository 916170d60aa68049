"""Codes of two int8 numbers, 16 bits a column: what an index reads ranks and log-probabilities from
where matrix units multiply int8.

The first number is that of the int8 copy, the second (the kind "fine") what it misses, in
``LOW_PARTS`` steps. Errors are 1/250 of the int8 copy's and about 1/30 of bfloat16's:
hardly a row is left to be settled.
"""

from dataclasses import replace

import torch

from .._cpu import extension
from .._exact.bounds import Queries
from .quantize import PRODUCTS, UP, CodeBounds, Codes, Limits, centre, padded

KIND, COARSE_KIND = "fine", "int8"
# exact sums, and six roundings: of each sum, their weighted sum, the step, and times step and scale
_PRODUCT = replace(PRODUCTS[COARSE_KIND][0], name="2 int8 x int16", unit=2.0**-21)


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

    def __init__(
        self, fields: dict[str, Codes], limits: Limits, mean: torch.Tensor, query: Queries
    ) -> None:
        """fields: those of ``quantize.CodeScan`` of the int8 copy; ``low``: the second codes."""
        super().__init__(limits, mean, _PRODUCT, query)
        self.fields = fields

    def stats(self, contest: extension.Contest, most_near: int) -> extension.Stats:
        fields = self.fields
        trusted = None if self.limits.trusted else fields["trusted"]
        codes = fields["code"], len(fields["trusted"]), fields["scale"], None, trusted
        return extension.code_stats(
            extension.Codes(*codes, *self.operand.value, self.error),
            fields["low"],
            contest,
            most_near,
        )
