"""Half-precision codes in the packed blocks of FBGEMM, torch's CPU kernels for narrow weights.

Products Q C^T [B, n] of queries Q [B, d] and codes C [n, d], block by block of BLOCK rows: 2 bytes
a column read, 2 B BLOCK d operations. Numerics: float32 sums of fused multiply-adds, one rounding
a term.

FBGEMM reads float16 weights, widens them in registers and accumulates in float32: half the bytes of
a float32 table for a few queries, and its kernels are the faster ones for many. It only multiplies
blocks that it has packed itself, and a packed block cannot be written. So blocks are packed once,
and rows written since wait beside them until a block has enough of them to be packed again: a
written row costs O(d), amortised, and a search multiplies the waiting rows apart.
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

    def __init__(self, d: int) -> None:
        self._d, self._size = d, 0
        self._blocks: list[_Block | None] = []  # None: all of its rows wait
        self._late_in = torch.empty(0, dtype=torch.int64)  # [blocks], rows of each that wait
        self._slot = torch.empty(0, dtype=torch.int64)  # [blocks * BLOCK], of a waiting row, or -1
        self._late_rows = torch.empty(0, dtype=torch.int64)  # by slot; the first ``waiting`` count
        self._late_codes = torch.empty(0, d, dtype=self.dtype)
        self.waiting = 0

    @property
    def width(self) -> int:
        """d."""
        return self._d

    def __len__(self) -> int:
        """n: one more than the highest row written."""
        return self._size

    def write(self, rows: torch.Tensor, codes: torch.Tensor) -> None:
        """Set the codes [m, d] of distinct rows int64 [m]."""
        if not rows.numel():
            return
        self._grow(int(rows.max()) + 1)
        known = self._slot[rows] >= 0
        self._late_codes[self._slot[rows[known]]] = codes[known]
        fresh = rows[~known]
        slots = torch.arange(self.waiting, self.waiting + fresh.numel())
        self.waiting += fresh.numel()
        self._reserve(self.waiting)
        self._late_rows[slots], self._late_codes[slots] = fresh, codes[~known]
        self._slot[fresh] = slots
        self._late_in += torch.bincount(fresh // BLOCK, minlength=len(self._blocks))
        for block in (self._late_in > BLOCK // _LATE_SHARE).nonzero()[:, 0].tolist():
            self._pack(block)

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """The codes [n, d] of rows int64 [n]; unpacks every block they lie in."""
        codes = torch.empty(len(rows), self._d, dtype=self.dtype)
        for block in (rows // BLOCK).unique().tolist():
            own = rows // BLOCK == block
            codes[own] = self._unpack(block)[rows[own] - block * BLOCK]
        return codes

    def truncate(self, size: int) -> None:
        """Forget the rows from ``size`` on."""
        self._drop(self._slot[size:])
        blocks = -(-size // BLOCK)
        self._size, self._slot = size, self._slot[: blocks * BLOCK]
        self._late_in = self._late_in[:blocks]
        del self._blocks[blocks:]

    def multiply(self, queries: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Products float32 [B, stop - start] of queries float32 [B, d] and the rows start..stop-1.

        ``start`` is a multiple of BLOCK; rows beyond the last give any number.
        """
        parts = [
            self._multiply_block(queries, block, min(BLOCK, stop - block * BLOCK))
            for block in range(start // BLOCK, -(-stop // BLOCK))
        ]
        products = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        slots = self._slot[start:stop]
        late = (slots >= 0).nonzero()[:, 0] if self.waiting else slots[:0]
        if late.numel():
            products[:, late] = queries @ self._late_codes[slots[late]].float().T
        return products

    def _multiply_block(self, queries: torch.Tensor, block: int, size: int) -> torch.Tensor:
        packed = self._blocks[block]
        if packed is None:
            return queries.new_zeros(len(queries), size)
        products = torch.ops.quantized.linear_dynamic_fp16(queries, packed.weight)[:, :size]
        if packed.rows < size:
            products = torch.nn.functional.pad(products, (0, size - packed.rows))
        return products

    def _grow(self, size: int) -> None:
        """Hold rows up to ``size``."""
        self._size = max(self._size, size)
        more = -(-self._size // BLOCK) - len(self._blocks)
        self._blocks += [None] * more
        self._late_in = torch.nn.functional.pad(self._late_in, (0, more))
        self._slot = torch.nn.functional.pad(self._slot, (0, more * BLOCK), value=-1)

    def _reserve(self, slots: int) -> None:
        if slots > len(self._late_rows):
            more = max(slots, 2 * len(self._late_rows)) - len(self._late_rows)
            self._late_rows = torch.nn.functional.pad(self._late_rows, (0, more))
            self._late_codes = torch.nn.functional.pad(self._late_codes, (0, 0, 0, more))

    def _pack(self, block: int) -> None:
        """Take the waiting rows of a block into it."""
        codes = self._unpack(block)
        weight = torch.ops.quantized.linear_prepack_fp16(codes.float(), None)
        self._blocks[block] = _Block(weight, len(codes))
        self._drop(self._slot[block * BLOCK : (block + 1) * BLOCK])

    def _unpack(self, block: int) -> torch.Tensor:
        """The codes [rows, d] of a block as last written."""
        codes = torch.zeros(min(BLOCK, self._size - block * BLOCK), self._d, dtype=self.dtype)
        packed = self._blocks[block]
        if packed is not None:
            rows = min(packed.rows, len(codes))
            codes[:rows] = torch.ops.quantized.linear_unpack_fp16(packed.weight)[0][:rows]
        slots = self._slot[block * BLOCK : block * BLOCK + len(codes)]
        late = (slots >= 0).nonzero()[:, 0]
        codes[late] = self._late_codes[slots[late]]
        return codes

    def _drop(self, slots: torch.Tensor) -> None:
        """Free these slots (-1: none); waiting rows from the end fill their places."""
        slots = slots[slots >= 0]
        rows, kept = self._late_rows[slots], self.waiting - slots.numel()
        self._slot[rows] = -1
        self._late_in -= torch.bincount(rows // BLOCK, minlength=len(self._late_in))
        leaving = torch.zeros(slots.numel(), dtype=torch.bool)
        leaving[slots[slots >= kept] - kept] = True
        source, target = (~leaving).nonzero()[:, 0] + kept, slots[slots < kept]
        self._late_rows[target] = self._late_rows[source]
        self._late_codes[target] = self._late_codes[source]
        self._slot[self._late_rows[target]] = target
        self.waiting = kept


class _Block(NamedTuple):
    weight: torch.ScriptObject  # packed, [rows, d]
    rows: int
