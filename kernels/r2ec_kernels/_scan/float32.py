"""The coarse scan of a table's own rows: float32 products in blocks, any device.

Raw scores of rows X [N, d] for queries q, in float32: dot q.x, cosine (q.x) / |x|, l2
q.x - |x|^2 / 2, each within ``Queries.product_error`` of the exact one. Rows of other types are
widened block by block.

A block has ``block_rows`` rows: [n, B] scores, 2 n B d FLOPs by the matrix library, n d elements
read (twice where norms are taken on the way, in pieces that stay in the cache). A product may be
summed in ``parts``, which divides the error bound. Rows whose norm float32 cannot hold are
unbounded: their scores are -inf and their numbers are returned.
"""

import math
from dataclasses import replace

import torch

from .._cpu import extension
from .._exact.bounds import Queries
from .._numbers import HUGE, UNIT
from .blocks import CACHED, GROUP, Buffer, Scores, subtracted, whole_groups

# A block of rows, in elements: on a CPU enough to hide the bookkeeping of a block. Rows
# that are read twice are taken in pieces that stay in its cache, unless the whole table does.
_BLOCK, _BLOCK_ROWS = 1 << 24, 1 << 14
_PIECE = 1 << 20
_DEVICE_BLOCK = 1 << 26


def block_rows(d: int, batch: int, device: torch.device) -> int:
    """Rows of a block for ``batch`` queries."""
    if device.type != "cpu":
        rows = _DEVICE_BLOCK // (d + 2 * batch)
    else:
        rows = min(_BLOCK // (d + 2 * batch), _BLOCK_ROWS)
    return max(256, rows // GROUP * GROUP)


class Float32Scan:
    """Float32 products of a table's rows, widened block by block where they are narrower."""

    name = "float32"

    def __init__(
        self, rows: torch.Tensor, norms: torch.Tensor | None, query: Queries, parts: int = 1
    ) -> None:
        """rows: [N, d]; norms: float32 [N] of the rows, or None to take them on the way; parts: a
        product is summed in so many parts, which divides its error bound for a few percent of its
        time."""
        batch, d = query.scaled.shape[0], rows.shape[1]
        self.chunk = -(-d // parts)
        # d terms in ``parts`` sums: chunk + parts roundings instead of d
        saved = max(0, d - self.chunk - parts) if parts > 1 else 0
        query = replace(query, unit=query.unit - saved * UNIT)
        self.rows, self.norms, self.query = rows, norms, query
        self.offset = torch.zeros(batch, dtype=torch.float64, device=rows.device)
        self.height = self.piece = block_rows(d, batch, rows.device)
        if norms is None and rows.device.type == "cpu" and rows.numel() > CACHED:
            self.piece = min(self.height, max(64, _PIECE // (d + 2 * batch)))
        self.operand = query.scaled.T.contiguous()
        self.buffer = Buffer(rows.device)
        self.error: torch.Tensor | None = (
            None  # of every block, where the stored norms bound all rows
        )
        if norms is not None and norms.numel():
            low, high = (float(edge) for edge in torch.aminmax(norms))
            if high <= HUGE and (low >= 1 / HUGE or query.similarity != "cosine"):
                self.error = query.product_error(self._norm_bound(high))

    def score(self, start: int, stop: int) -> Scores:
        values = self.buffer.take(whole_groups(stop - start), self.operand.shape[1])
        values[stop - start :] = float("-inf")
        error, unbounded = self._fill(start, stop, values[: stop - start])
        return Scores(values, error, unbounded)

    def feed(
        self,
        collector: extension.Collector,
        blocks: list[tuple[int, int]],
        allowed: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        if allowed is None and extension.fits(self.rows, self.query.scaled.shape[0]):
            return collector.add_rows(self.rows, self.query)
        unbounded = []
        for start, stop in blocks:
            values = self.buffer.take(stop - start, self.operand.shape[1])
            error, rows = self._fill(start, stop, values)
            half = subtracted(None, allowed, start, stop)
            collector.add_products(values, start, stop - start, None, half, error, 0.0)
            if rows is not None:
                unbounded.append(rows)
        return torch.cat(unbounded) if unbounded else None

    def _fill(
        self, start: int, stop: int, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Write raw scores of rows start..stop-1 into ``out``; returns their error bounds and the
        unbounded rows, whose scores are -inf."""
        query = self.query
        norms = self._multiply(start, stop, out)
        if query.similarity == "cosine":
            out.mul_(torch.where(norms > 0, norms.reciprocal(), 0.0)[:, None])
        elif query.similarity == "l2":
            out.sub_(0.5 * (norms * norms)[:, None])
        if self.error is not None:
            return self.error, None
        low, high = (float(edge) for edge in torch.aminmax(norms))
        bounded = norms <= HUGE
        if query.similarity == "cosine" and not low >= 1 / HUGE:  # NaN hides a small norm
            bounded &= (norms >= 1 / HUGE) | (self.rows[start:stop] == 0).all(1)
        unbounded = None
        if not bool(bounded.all()):
            unbounded = (~bounded).nonzero()[:, 0]
            out[unbounded] = float("-inf")
            high = float(torch.where(bounded, norms, 0.0).max())
            unbounded = unbounded + start
        return query.product_error(self._norm_bound(high)), unbounded

    def _multiply(self, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Write products into ``out`` [stop - start, B]; returns the rows' norms."""
        norms = []
        for first in range(start, stop, self.piece):
            rows = self.rows[first : min(first + self.piece, stop)].float()
            products = out[first - start : first - start + rows.shape[0]]
            torch.mm(rows[:, : self.chunk], self.operand[: self.chunk], out=products)
            for at in range(self.chunk, rows.shape[1], self.chunk):
                part = slice(at, at + self.chunk)
                products.addmm_(rows[:, part], self.operand[part])
            if self.norms is None:
                norms.append(torch.linalg.vector_norm(rows, dim=1))
        return torch.cat(norms) if self.norms is None else self.norms[start:stop]

    def _norm_bound(self, high: float) -> torch.Tensor:
        """An upper bound; squares below float32's normal range may be lost from a norm."""
        bound = high * 1.001 + math.sqrt(self.rows.shape[1]) * 2.0**-62
        return torch.tensor(bound, device=self.rows.device)
