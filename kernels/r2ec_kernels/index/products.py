"""The ways to multiply the codes of a scan copy with queries.

For codes C [n, d padded] and queries q' [B, d padded], as a product rounds them, each returns
C q' [n, B] for a block of rows: 2 n B d operations, and one read of the codes, which is what a scan
of few queries costs. They differ in the types they multiply and so in their error, relative to
|q'| |c|: the accumulation of d terms (``addition`` each), and ``unit`` or ``rounding`` for what
happens to a finished sum. |q - q'| is returned beside the queries (``Operand.missed``).
``quantize.CodeBounds`` makes a bound of it. None is chosen here: ``autoselect`` measures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import torch

from .._cpu import extension
from .._exact.bounds import Queries
from .._numbers import UNIT
from .._scan.blocks import GROUP, Buffer, whole_groups
from . import fbgemm
from .quantize import padded

_BF16_UNIT = 2.0**-9
_TILE = 16  # columns of an AMX tile

C = TypeVar("C")  # codes [n, d padded]: a tensor, or fbgemm.PackedCodes
V = TypeVar("V")  # queries as a product takes them: a tensor, or several


@dataclass(frozen=True)
class Operand(Generic[V]):
    """Queries as a product uses them: ``value``, and |q - q'| [B]."""

    value: V
    missed: torch.Tensor


@dataclass(frozen=True)
class Product(Generic[C, V]):
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
        candidates: rows that it leaves to rescore for a result, on well-spread rows.
        fused: whether the C++ extension offers its scores as it makes them.
    """

    name: str
    prepare: Callable[[torch.Tensor], Operand[V]]
    run: Callable[[C, int, int, Operand[V], Buffer], torch.Tensor]
    unit: float
    supports: Callable[[C, int], bool]
    block: int = GROUP
    addition: float = 2 * UNIT
    rounding: float = 0.0
    candidates: float = 3.0
    fused: bool = False


_Scaled = tuple[torch.Tensor, torch.Tensor]  # integers, and the step [B] they count


def _round_query(dtype: torch.dtype) -> Callable[[torch.Tensor], Operand[torch.Tensor]]:
    def prepare(query: torch.Tensor) -> Operand[torch.Tensor]:
        value = query.to(dtype)
        return Operand(value, torch.linalg.vector_norm(query - value.double(), dim=1))

    return prepare


def _split_query(query: torch.Tensor) -> Operand[_Scaled]:
    """q' = s h + (s / 254) l with int8 h and l: two terms, one integer product."""
    step = query.abs().amax(1, keepdim=True) / 127
    step = torch.where(step == 0, 1.0, step).float()
    high = (query / step).round().clamp(-127, 127)
    low = ((query - step * high) / (step / 254)).round().clamp(-127, 127)
    value = step.double() * (high + low / 254)
    packed = torch.cat([high, low]).to(torch.int8).T.contiguous()  # [d, 2B]
    missed = torch.linalg.vector_norm(query - value, dim=1)
    return Operand((packed, step[:, 0]), missed)


def _wide_query(query: torch.Tensor) -> Operand[_Scaled]:
    """q' = s h with int16 h, so small that a sum of products with int8 codes stays inside int32."""
    largest = min(127 * 256 + 127, (2**31 - 1) // (127 * query.shape[1]))
    step = query.abs().amax(1, keepdim=True) / largest
    step = torch.where(step == 0, 1.0, step).float()
    value = (query / step).round().clamp(-largest, largest)
    missed = torch.linalg.vector_norm(query - step.double() * value, dim=1)
    return Operand((value.to(torch.int16), step[:, 0]), missed)


def _run_widened(
    codes: torch.Tensor, start: int, stop: int, operand: Operand[torch.Tensor], buffer: Buffer
) -> torch.Tensor:
    out = buffer.take(stop - start, operand.value.shape[0])
    return torch.mm(codes[start:stop].float(), operand.value.T, out=out)


@cache
def has_bf16_tiles(device: torch.device) -> bool:
    """Whether ``device`` is a CPU with AMX tiles for bfloat16, which leave float16 far behind."""
    if device.type != "cpu":
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16")) and torch.backends.mkldnn.is_available()


def _run_bf16(
    codes: torch.Tensor, start: int, stop: int, operand: Operand[torch.Tensor], buffer: Buffer
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
    codes: torch.Tensor, start: int, stop: int, operand: Operand[torch.Tensor], buffer: Buffer
) -> torch.Tensor:
    ones = torch.ones(stop - start, dtype=torch.bfloat16, device=codes.device)
    return torch._weight_int8pack_mm(operand.value, codes[start:stop], ones).float().T


def _run_integer(
    codes: torch.Tensor, start: int, stop: int, operand: Operand[_Scaled], buffer: Buffer
) -> torch.Tensor:
    packed, step = operand.value
    high, low = torch._int_mm(codes[start:stop], packed).float().chunk(2, dim=1)
    out = buffer.take(stop - start, step.shape[0])
    return torch.add(high, low, alpha=1 / 254, out=out).mul_(step)


def _run_wide(
    codes: torch.Tensor, start: int, stop: int, operand: Operand[_Scaled], buffer: Buffer
) -> torch.Tensor:
    query, step = operand.value
    out = buffer.take(len(query), stop - start)
    extension.multiply_codes(codes[start:stop], query, step, out)
    return out.T


def _run_fbgemm(
    codes: fbgemm.PackedCodes, start: int, stop: int, operand: Operand[torch.Tensor], buffer: Buffer
) -> torch.Tensor:
    return codes.multiply(operand.value, start, stop).T


def _anywhere(codes: torch.Tensor | fbgemm.PackedCodes, batch: int) -> bool:
    return True


def _without_tiles(codes: torch.Tensor, batch: int) -> bool:
    # with AMX tiles it takes ten times as long, which the measurement's small sample does not show
    return not has_bf16_tiles(codes.device)


def _by_library(codes: torch.Tensor, batch: int) -> bool:
    return codes.device.type == "cpu" and not _compiled(codes, batch)


def _compiled(codes: torch.Tensor, batch: int) -> bool:
    return extension.multiplies_codes(codes.device, batch)


_WIDENED = Product("widened", _round_query(torch.float32), _run_widened, 0.0, _without_tiles)
_TO_BF16 = 2 * _BF16_UNIT  # relative to the rounded sum, and to spare
# by kind of copy; a kind's codes and its products' operands have one type each
PRODUCTS: dict[str, tuple[Product[Any, Any], ...]] = {
    "fp16": (
        Product(
            "fp16",
            _round_query(torch.float32),
            _run_fbgemm,
            0.0,
            _anywhere,
            block=fbgemm.BLOCK,
            addition=UNIT,  # fused multiply-adds
            candidates=1.05,
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
            candidates=4.0,
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


def measured_run(
    product: Product[Any, Any], codes: torch.Tensor | fbgemm.PackedCodes, query: Queries
) -> Callable[[int], int]:
    """A function that multiplies the first n rows of ``codes`` (or the least more that the product
    can) with a batch, for timing, and returns how many it multiplied."""
    operand = product.prepare(padded(query.exact()))
    buffer = Buffer(query.scaled.device)

    def run(rows: int) -> int:
        stop = min(-(-rows // product.block) * product.block, whole_groups(len(codes)))
        product.run(codes, 0, stop, operand, buffer)
        return stop

    return run
