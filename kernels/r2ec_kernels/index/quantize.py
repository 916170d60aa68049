"""Low-precision centred copies of a table and the first passes over them.

A row x is stored as a code of y - m, where y is x (cosine: x / |x|) and m the mean of all y when
the index was built: the mean adds one constant to all scores of a query, and without it the code
spends its bits on what differs between rows. Kept beside the code: the norm of what it misses
(``residual``) and of what it holds (``size``). With q' the query as the product uses it,

    |q.(y - m) - q'.code| <= |q| residual + |q - q'| size + (error of the product) |q'| size.

A product that returns bfloat16 rounds a finished float32 sum: that error is relative to the score,
which is far below |q'| size, and is bounded by the largest score of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch

from .._cpu import extension
from .._exact.bounds import Queries
from .._numbers import HUGE, UNIT
from .._scan.blocks import GROUP, Buffer, Scores, whole_groups
from . import fbgemm

DIM_MULTIPLE = 64  # columns of a code, beside GROUP rows; padded with zeros
_BF16_UNIT = 2.0**-9
_TILE = 16  # columns of an AMX tile
_TINY = 2.0**-100  # relative to size: products that leave float32's normal range
UP = 1.0 + 2.0**-20  # a float64 bound stays one after rounding to float32


@dataclass(frozen=True)
class Operand:
    """Queries as a product uses them: ``value``, and |q - q'| [B]."""

    value: torch.Tensor | tuple[torch.Tensor, ...]
    missed: torch.Tensor


Codes = torch.Tensor | fbgemm.PackedCodes  # [n, d padded]


@dataclass(frozen=True)
class Product:
    """One way to multiply codes with queries.

    Attributes:
        name: for statistics and messages.
        prepare: float64 queries [B, d padded] -> Operand.
        run: (codes, start, stop, Operand, Buffer) -> float32 or bfloat16 [stop - start, B], in the
            buffer or memory of its own; ``start`` a multiple of ``block``, ``stop`` of GROUP.
        unit: error of the product relative to |q'| size, beyond the accumulation of its d terms.
        rounding: error relative to a finished sum.
        supports: (codes, batch) -> whether it can run here.
        block: rows that are multiplied together.
        addition: relative error of adding one term to a float32 sum.
        rescoring: what it costs more than float32 by the rows it leaves to rescore, a factor.
        fused: whether the C++ extension offers its scores as it makes them.
    """

    name: str
    prepare: Callable[[torch.Tensor], Operand]
    run: Callable[[Codes, int, int, Operand, Buffer], torch.Tensor]
    unit: float
    supports: Callable[[Codes, int], bool]
    block: int = GROUP
    addition: float = 2 * UNIT
    rounding: float = 0.0
    rescoring: float = 1.18
    fused: bool = False


def _round_query(dtype: torch.dtype) -> Callable[[torch.Tensor], Operand]:
    def prepare(query: torch.Tensor) -> Operand:
        value = query.to(dtype)
        return Operand(value, torch.linalg.vector_norm(query - value.double(), dim=1))

    return prepare


def _split_query(query: torch.Tensor) -> Operand:
    """q' = s h + (s / 254) l with int8 h and l: two terms, one integer product."""
    step = query.abs().amax(1, keepdim=True) / 127
    step = torch.where(step == 0, 1.0, step).float()
    high = (query / step).round().clamp(-127, 127)
    low = ((query - step * high) / (step / 254)).round().clamp(-127, 127)
    value = step.double() * (high + low / 254)
    packed = torch.cat([high, low]).to(torch.int8).T.contiguous()  # [d, 2B]
    missed = torch.linalg.vector_norm(query - value, dim=1)
    return Operand((packed, step[:, 0]), missed)


def _wide_query(query: torch.Tensor) -> Operand:
    """q' = s h with int16 h, so small that a sum of products with int8 codes stays inside int32."""
    largest = min(127 * 256 + 127, (2**31 - 1) // (127 * query.shape[1]))
    step = query.abs().amax(1, keepdim=True) / largest
    step = torch.where(step == 0, 1.0, step).float()
    value = (query / step).round().clamp(-largest, largest)
    missed = torch.linalg.vector_norm(query - step.double() * value, dim=1)
    return Operand((value.to(torch.int16), step[:, 0]), missed)


def _run_widened(
    codes: torch.Tensor, start: int, stop: int, operand: Operand, buffer: Buffer
) -> torch.Tensor:
    out = buffer.take(stop - start, operand.value.shape[0])
    return torch.mm(codes[start:stop].float(), operand.value.T, out=out)


@cache
def has_bf16_tiles(device: torch.device) -> bool:
    """Whether ``device`` is a CPU with matrix units for bfloat16 (AMX), which leave float16 far
    behind."""
    if device.type != "cpu":
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16")) and torch.backends.mkldnn.is_available()


def _run_bf16(
    codes: torch.Tensor, start: int, stop: int, operand: Operand, buffer: Buffer
) -> torch.Tensor:
    query = operand.value
    batch = query.shape[0]
    if batch < _TILE and has_bf16_tiles(codes.device):
        query = torch.nn.functional.pad(query, (0, 0, 0, _TILE - batch))  # fewer take longer
    if query.shape[0] == 1:
        return torch.mv(codes[start:stop], query[0])[:, None]
    out = buffer.take(stop - start, query.shape[0], torch.bfloat16)
    return torch.mm(codes[start:stop], query.T, out=out)[:, :batch]


def _run_mixed(
    codes: torch.Tensor, start: int, stop: int, operand: Operand, buffer: Buffer
) -> torch.Tensor:
    ones = torch.ones(stop - start, dtype=torch.bfloat16, device=codes.device)
    return torch._weight_int8pack_mm(operand.value, codes[start:stop], ones).float().T


def _run_integer(
    codes: torch.Tensor, start: int, stop: int, operand: Operand, buffer: Buffer
) -> torch.Tensor:
    packed, step = operand.value
    high, low = torch._int_mm(codes[start:stop], packed).float().chunk(2, dim=1)
    out = buffer.take(stop - start, step.shape[0])
    return torch.add(high, low, alpha=1 / 254, out=out).mul_(step)


def _run_wide(
    codes: torch.Tensor, start: int, stop: int, operand: Operand, buffer: Buffer
) -> torch.Tensor:
    query, step = operand.value
    out = buffer.take(len(query), stop - start)
    extension.multiply_codes(codes[start:stop], query, step, out)
    return out.T


def _run_fbgemm(
    codes: fbgemm.PackedCodes, start: int, stop: int, operand: Operand, buffer: Buffer
) -> torch.Tensor:
    return codes.multiply(operand.value, start, stop).T


def _anywhere(codes: Codes, batch: int) -> bool:
    return True


def _without_tiles(codes: Codes, batch: int) -> bool:
    # with them it takes ten times as long, which the measurement's small sample does not show
    return not has_bf16_tiles(codes.device)


def _by_library(codes: Codes, batch: int) -> bool:
    return codes.device.type == "cpu" and not _compiled(codes, batch)


def _compiled(codes: Codes, batch: int) -> bool:
    return extension.multiplies_codes(codes.device, batch)


_WIDENED = Product("widened", _round_query(torch.float32), _run_widened, 0.0, _without_tiles)
_TO_BF16 = 2 * _BF16_UNIT  # relative to the rounded sum, and to spare
PRODUCTS = {
    "fp16": (
        Product(
            "fp16",
            _round_query(torch.float32),
            _run_fbgemm,
            0.0,
            _anywhere,
            block=fbgemm.BLOCK,
            addition=UNIT,  # fused multiply-adds
            rescoring=1.02,
        ),
    ),
    "bf16": (
        Product("bf16", _round_query(torch.bfloat16), _run_bf16, 0.0, _anywhere, rounding=_TO_BF16),
        _WIDENED,
    ),
    "int8": (
        Product(
            "int8 x int16",
            _wide_query,
            _run_wide,
            2.0**-22,  # an exact sum, three roundings
            _compiled,
            addition=0.0,
            rescoring=1.3,
            fused=True,
        ),
        Product(
            "int8 x bf16",
            _round_query(torch.bfloat16),
            _run_mixed,
            0.0,
            _by_library,
            rounding=_TO_BF16,
        ),
        Product("int8 x 2 int8", _split_query, _run_integer, 2.0**-22, _by_library),
        _WIDENED,
    ),
}


def encode(
    rows: torch.Tensor, kind: str, similarity: str, mean: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Codes of rows [n, d]: the tensors of an index's low-precision copy.

    code float16, bfloat16 or int8 [n, d padded]; float32 [n]: scale, residual, size, and half
    (|y - m|^2 / 2, for l2); trusted bool [n]: False where float32 cannot hold the numbers (the code
    of such a row is 0).
    """
    exact, trusted = centre(rows, similarity, mean)
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
        "trusted": trusted,
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
    """The mean of y over trusted rows, float64 [d], by blocks."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for block in rows.split(4096):
        total += centre(block, similarity, torch.zeros_like(total))[0].sum(0)
    return total / max(1, rows.shape[0])


def centre(
    rows: torch.Tensor, similarity: str, mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What codes of rows [n, d] stand for: y - m float64 [n, d]; trusted bool [n]."""
    exact = rows.double()
    norms = torch.linalg.vector_norm(exact, dim=1)
    trusted = norms <= HUGE
    if similarity == "cosine":
        trusted &= (norms >= 1 / HUGE) | (norms == 0)
        exact = exact / torch.where(norms == 0, 1.0, norms)[:, None]
    return torch.where(trusted[:, None], exact - mean, 0.0), trusted


def measured_run(product: Product, codes: Codes, query: Queries) -> Callable[[int], int]:
    """A function that multiplies the first n rows of ``codes`` (or the least more that the product
    can) with a batch, for timing, and returns how many it multiplied."""
    operand = product.prepare(padded(query.exact()))
    buffer = Buffer(query.scaled.device)

    def run(rows: int) -> int:
        stop = min(-(-rows // product.block) * product.block, whole_groups(len(codes)))
        product.run(codes, 0, stop, operand, buffer)
        return stop

    return run


class Limits(NamedTuple):
    """What a pass has to know of all rows of a copy.

    Attributes:
        residual, size, norm: float32 [], the largest of trusted rows.
        typical_residual: float32 [], the root of their mean square.
        trusted: whether all rows are.
        scaled: whether some row's scale is not 1.
    """

    residual: torch.Tensor
    size: torch.Tensor
    norm: torch.Tensor
    typical_residual: torch.Tensor
    trusted: bool
    scaled: bool

    @classmethod
    def of(cls, fields: dict[str, Codes]) -> "Limits":
        trusted = fields["trusted"]
        residual, size, norm = (
            torch.where(trusted, fields[name], 0.0) for name in ("residual", "size", "norm")
        )
        return cls(
            residual=residual.max(),
            size=size.max(),
            norm=norm.max(),
            typical_residual=residual.square().mean().sqrt(),
            trusted=bool(trusted.all()),
            scaled=bool((fields["scale"] != 1).any()),
        )


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
        self, limits: Limits, mean: torch.Tensor, product: Product, query: Queries
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


class CodeScan(CodeBounds):
    """First pass over the codes in ``fields`` (see ``encode``) by one product."""

    def __init__(
        self,
        fields: dict[str, Codes],
        limits: Limits,
        mean: torch.Tensor,
        product: Product,
        query: Queries,
        height: int,
    ) -> None:
        """``fields``: live rows, the code padded to whole groups; ``height``: about so many rows
        at once."""
        super().__init__(limits, mean, product, query)
        self.fields, self.name = fields, product.name
        self.height = -(-height // product.block) * product.block
        self.buffer = Buffer(query.scaled.device)

    def score(self, start: int, stop: int) -> Scores:
        size = stop - start
        values = self._multiply(start, size)
        if values.dtype != torch.float32:
            values = self.buffer.take(*values.shape).copy_(values)
        field = {name: self.fields[name][start:stop] for name in ("scale", "half", "trusted")}
        if self.limits.scaled:
            values[:size].mul_(field["scale"][:, None])
        error = self.error
        if self.product.rounding:
            values[size:] = 0.0
            error = error + self.product.rounding * UP * _largest(values)
        values[size:] = float("-inf")
        if self.query.similarity == "l2":
            values[:size].sub_(field["half"][:, None])
        if self.limits.trusted:
            return Scores(values, error, None)
        doubtful = (~field["trusted"]).nonzero()[:, 0]
        values[doubtful] = float("-inf")
        return Scores(values, error, doubtful + start if doubtful.numel() else None)

    def feed(
        self, collector: extension.Collector, blocks: list[tuple[int, int]]
    ) -> torch.Tensor | None:
        trusted = self.fields["trusted"]
        scale = self.fields["scale"] if self.limits.scaled else None
        half = self.fields["half"] if self.query.similarity == "l2" else None
        doubtful = None if self.limits.trusted else (~trusted).nonzero()[:, 0]
        if self.product.fused:
            allowed = None if self.limits.trusted else trusted
            codes = self.fields["code"], len(trusted), scale, half, allowed
            collector.add_codes(extension.Codes(*codes, *self.operand.value, self.error))
            return doubtful
        for start, stop in blocks:
            values = self._multiply(start, stop - start)
            if not self.limits.trusted:
                own = (doubtful >= start) & (doubtful < stop)
                values[doubtful[own] - start] = float("-inf")
            collector.add_products(
                values,
                start,
                stop - start,
                *(None if field is None else field[start:stop] for field in (scale, half)),
                self.error,
                self.product.rounding * UP,
            )
        return doubtful

    def _multiply(self, start: int, size: int) -> torch.Tensor:
        """Products of the rows from ``start``, and of rows without meaning up to a whole group."""
        stop = start + whole_groups(size)
        return self.product.run(self.fields["code"], start, stop, self.operand, self.buffer)
