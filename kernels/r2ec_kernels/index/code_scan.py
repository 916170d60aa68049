"""The coarse scan of a scan copy by one of the products of its kind.

Raw scores of the rows of a copy (``quantize``) for queries q, with one product C q' (``products``):

    g'(n, b) = scale_n (c_n . q'_b) [- half_n for l2],    |g' - g| <= error_b

where g lacks what the mean adds to a query's raw scores (``offset``). The bound is that of
``quantize``'s docstring, taken over all rows of the copy (``Limits``), so it is one number a query.

Blocks of ``height`` rows; each reads d codes and 4 to 8 bytes a row and writes [n, B] scores,
unless the C++ extension makes and filters them in registers (``Product.fused``). FLOPs: 2 n B d.
Numerics: float32 scores; unbounded rows score -inf and are returned apart.
"""

from functools import cached_property
from typing import Any, Generic, TypeVar

import torch

from .._cpu import extension
from .._exact.bounds import Queries
from .._scan.blocks import GROUP, Buffer, Scores, subtracted, whole_groups
from .products import Product
from .quantize import UP, Limits, ScanCopy, padded

_TINY = 2.0**-100  # relative to size: products that leave float32's normal range

C = TypeVar("C")


def _largest(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each column of [n, B], n a multiple of GROUP."""
    grouped = values.unflatten(0, (GROUP, -1))  # all rows at once would not be vectorised
    return torch.maximum(grouped.amax(0).amax(0), -grouped.amin(0).amin(0))


class CodeBounds:
    """Queries as a product multiplies them with codes, and how far the raw scores may be off.

    Attributes:
        operand: the queries.
        error: float32 [B], bound of a raw score's error, beyond that of the product's rounding.
    """

    def __init__(
        self, limits: Limits, mean: torch.Tensor, product: Product[Any, Any], query: Queries
    ) -> None:
        self.limits, self.mean, self.product, self.query = limits, mean, product, query
        exact = query.exact()
        if query.similarity == "l2":
            exact = exact - mean
        self.operand = product.prepare(padded(exact))
        norm = self._norm = torch.linalg.vector_norm(exact, dim=1)
        used = norm + self.operand.missed
        unit = product.unit + (exact.shape[1] + 4) * product.addition + _TINY
        residual, size = limits.residual, limits.size
        error = norm * residual + (self.operand.missed + unit * used) * size
        if query.similarity == "l2":
            error = error + 2.0**-21 * (norm + size + residual) ** 2
        self.error = (error * UP).float() + query.rounding_error(limits.norm * 1.001)

    @cached_property
    def offset(self) -> torch.Tensor:
        """float64 [B]: what the mean adds to a query's raw scores (dot, cosine)."""
        return self.query.exact() @ self.mean

    @cached_property
    def typical(self) -> torch.Tensor:
        """float64 [B]: the standard deviation of the raw scores' errors where the errors of a row's
        entries have nothing to do with the query: those of d entries mostly cancel, those of a
        product's result do not."""
        product, limits, missed = self.product, self.limits, self.operand.missed
        spread = self._norm * limits.typical_residual + missed * limits.size
        results = (product.unit + product.rounding) * (self._norm + missed) * limits.size
        return spread / self.query.scaled.shape[1] ** 0.5 + results


class CodeScan(CodeBounds, Generic[C]):
    """The scan of ``copy`` by one product."""

    def __init__(
        self,
        copy: ScanCopy[C],
        limits: Limits,
        mean: torch.Tensor,
        product: Product[C, Any],
        query: Queries,
        height: int,
    ) -> None:
        """``height``: about so many rows at once."""
        super().__init__(limits, mean, product, query)
        self.copy, self.name = copy, product.name
        self.height = -(-height // product.block) * product.block
        self.buffer = Buffer(query.scaled.device)

    def score(self, start: int, stop: int) -> Scores:
        size, rows = stop - start, slice(start, stop)
        values = self._multiply(start, size)
        if values.dtype != torch.float32:
            values = self.buffer.take(*values.shape).copy_(values)
        if self.limits.scaled:
            values[:size].mul_(self.copy.scale[rows, None])
        error = self.error
        if self.product.rounding:
            values[size:] = 0.0
            error = error + self.product.rounding * UP * _largest(values)
        values[size:] = float("-inf")
        if self.query.similarity == "l2":
            values[:size].sub_(self.copy.half[rows, None])
        if self.limits.bounded:
            return Scores(values, error, None)
        unbounded = (~self.copy.bounded[rows]).nonzero()[:, 0]
        values[unbounded] = float("-inf")
        return Scores(values, error, unbounded + start if unbounded.numel() else None)

    def feed(
        self,
        collector: extension.Collector,
        blocks: list[tuple[int, int]],
        allowed: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        copy, limits = self.copy, self.limits
        scale = copy.scale if limits.scaled else None
        half = copy.half if self.query.similarity == "l2" else None
        unbounded = None if limits.bounded else (~copy.bounded).nonzero()[:, 0]
        if self.product.fused:
            assert isinstance(copy.codes, torch.Tensor)  # fused products multiply int8 tensors
            queries, step = self.operand.value
            bounded = None if limits.bounded else copy.bounded
            if allowed is not None:  # the others are left out in the same way
                bounded = allowed if bounded is None else bounded & allowed
            collector.add_codes(
                extension.Codes(
                    codes=copy.codes,
                    num_rows=len(copy.bounded),
                    scale=scale,
                    half=half,
                    bounded=bounded,
                    queries=queries,
                    step=step,
                    error=self.error,
                )
            )
            return unbounded
        for start, stop in blocks:
            values = self._multiply(start, stop - start)
            if unbounded is not None:
                own = (unbounded >= start) & (unbounded < stop)
                values[unbounded[own] - start] = float("-inf")
            collector.add_products(
                products=values,
                start=start,
                num_rows=stop - start,
                scale=None if scale is None else scale[start:stop],
                half=subtracted(half, allowed, start, stop),
                error=self.error,
                relative=self.product.rounding * UP,
            )
        return unbounded

    def _multiply(self, start: int, size: int) -> torch.Tensor:
        """Products of the rows from ``start``, and of rows without meaning up to a whole group."""
        stop = start + whole_groups(size)
        return self.product.run(self.copy.codes, start, stop, self.operand, self.buffer)
