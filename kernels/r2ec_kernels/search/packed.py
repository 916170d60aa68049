"""Half-precision codes in the packed blocks of FBGEMM, torch's CPU library for narrow weights.

FBGEMM reads float16 weights, widens them in registers and accumulates in float32: half the bytes of
a float32 table for a few queries, and its kernels are the faster ones for many. It only multiplies
blocks that it has packed itself, and a packed block cannot be written. So blocks are packed once,
and rows written since then wait beside them (``_late``) until a block has enough of them to be
packed again: a written row costs O(d) and a search multiplies the waiting rows apart.
"""

from typing import NamedTuple

import torch

BLOCK = 8192  # rows packed together
_LATE_SHARE = 16  # a block is packed again once 1/16 of its rows waits


def available(device: torch.device) -> bool:
    """Whether this torch can pack and multiply on ``device``."""
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


class PackedCodes:
    """Codes float16 [n, d] that are written row by row and multiplied by the block."""

    dtype = torch.float16

    def __init__(self, dim: int) -> None:
        self._dim, self._size = dim, 0
        self._blocks: list[_Block | None] = []  # None: all of its rows wait
        self._late_rows = torch.empty(0, dtype=torch.int64)  # ascending
        self._late_codes = torch.empty(0, dim, dtype=self.dtype)

    def __len__(self) -> int:
        """n: one more than the highest row written."""
        return self._size

    def write(self, rows: torch.Tensor, codes: torch.Tensor) -> None:
        """Set the codes [m, d] of distinct rows int64 [m]."""
        if not rows.numel():
            return
        self._size = max(self._size, int(rows.max()) + 1)
        self._blocks += [None] * (-(-self._size // BLOCK) - len(self._blocks))
        old = ~torch.isin(self._late_rows, rows)
        late = torch.cat([self._late_rows[old], rows])
        order = torch.argsort(late)
        self._late_rows = late[order]
        self._late_codes = torch.cat([self._late_codes[old], codes])[order]
        waiting = torch.bincount(self._late_rows // BLOCK, minlength=len(self._blocks))
        for block in (waiting > BLOCK // _LATE_SHARE).nonzero()[:, 0].tolist():
            self._pack(block)

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """The codes [n, d] of rows int64 [n]; unpacks every block they lie in."""
        codes = torch.empty(len(rows), self._dim, dtype=self.dtype)
        for block in (rows // BLOCK).unique().tolist():
            own = rows // BLOCK == block
            codes[own] = self._unpack(block)[rows[own] - block * BLOCK]
        return codes

    def truncate(self, size: int) -> None:
        """Forget the rows from ``size`` on."""
        self._size = size
        kept = self._late_rows < size
        self._late_rows, self._late_codes = self._late_rows[kept], self._late_codes[kept]
        del self._blocks[-(-size // BLOCK) :]

    def multiply(self, queries: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Products float32 [B, stop - start] of queries float32 [B, d] and the rows start..stop-1.

        ``start`` is a multiple of BLOCK; rows beyond the last give any number.
        """
        parts = [
            self._multiply_block(queries, block, min(BLOCK, stop - block * BLOCK))
            for block in range(start // BLOCK, -(-stop // BLOCK))
        ]
        products = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        low, high = torch.searchsorted(self._late_rows, torch.tensor([start, stop])).tolist()
        if high > low:
            late = self._late_rows[low:high] - start
            products[:, late] = queries @ self._late_codes[low:high].float().T
        return products

    def _multiply_block(self, queries: torch.Tensor, block: int, size: int) -> torch.Tensor:
        packed = self._blocks[block]
        if packed is None:
            return queries.new_zeros(len(queries), size)
        products = torch.ops.quantized.linear_dynamic_fp16(queries, packed.weight)[:, :size]
        if packed.rows < size:
            products = torch.nn.functional.pad(products, (0, size - packed.rows))
        return products

    def _pack(self, block: int) -> None:
        """Take the waiting rows of a block into it."""
        codes = self._unpack(block)
        weight = torch.ops.quantized.linear_prepack_fp16(codes.float(), None)
        self._blocks[block] = _Block(weight, len(codes))
        kept = self._late_rows // BLOCK != block
        self._late_rows, self._late_codes = self._late_rows[kept], self._late_codes[kept]

    def _unpack(self, block: int) -> torch.Tensor:
        """The codes [rows, d] of a block as last written."""
        codes = torch.zeros(min(BLOCK, self._size - block * BLOCK), self._dim, dtype=self.dtype)
        packed = self._blocks[block]
        if packed is not None:
            rows = min(packed.rows, len(codes))
            codes[:rows] = torch.ops.quantized.linear_unpack_fp16(packed.weight)[0][:rows]
        own = self._late_rows // BLOCK == block
        codes[self._late_rows[own] - block * BLOCK] = self._late_codes[own]
        return codes


class _Block(NamedTuple):
    weight: torch.ScriptObject  # packed, [rows, d]
    rows: int
