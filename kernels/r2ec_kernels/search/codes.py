"""Low-precision centred copies of a table and the first passes over them.

A row x is stored as a code of y - m, where y is x (cosine: x / |x|) and m the mean of all y when
the index was built: the mean adds one constant to all scores of a query, and without it the code
spends its bits on what differs between rows. Kept beside the code: the norm of what it misses
(``residual``) and of what it holds (``size``). With q' the query as the product uses it,

    |q.(y - m) - q'.code| <= |q| residual + |q - q'| size + (error of the product) |q'| size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .bounds import HUGE, Queries

ROW_MULTIPLE = 32  # products take blocks of this many rows ...
DIM_MULTIPLE = 64  # ... of this many columns; a code is padded with zeros
_BF16_UNIT = 2.0**-9
_TINY = 2.0**-100  # relative to size: products that leave float32's normal range
_UP = 1.0 + 2.0**-20  # a float64 bound stays one after rounding to float32


@dataclass(frozen=True)
class Operand:
    """Queries as a product uses them: ``value``, and |q - q'| [B]."""

    value: torch.Tensor | tuple[torch.Tensor, ...]
    missed: torch.Tensor


@dataclass(frozen=True)
class Product:
    """One way to multiply codes [n, d] with queries.

    Attributes:
        name: for statistics and messages.
        prepare: float64 queries [B, d padded] -> Operand.
        run: (codes [n, d padded], Operand, out float32 [n, B]) -> None; n a multiple of 32.
        unit: relative error of the product beyond float32 accumulation.
        supports: (codes, batch) -> whether torch can run it here.
    """

    name: str
    prepare: Callable[[torch.Tensor], Operand]
    run: Callable[[torch.Tensor, Operand, torch.Tensor], None]
    unit: float
    supports: Callable[[torch.Tensor, int], bool]


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


def _run_widened(codes: torch.Tensor, operand: Operand, out: torch.Tensor) -> None:
    torch.mm(codes.float(), operand.value.T, out=out)


def _run_bf16(codes: torch.Tensor, operand: Operand, out: torch.Tensor) -> None:
    if operand.value.shape[0] == 1:
        out[:, 0] = torch.mv(codes, operand.value[0])
    else:
        out.copy_(torch.mm(codes, operand.value.T))


def _run_packed(codes: torch.Tensor, operand: Operand, out: torch.Tensor) -> None:
    ones = torch.ones(codes.shape[0], dtype=torch.bfloat16, device=codes.device)
    out.copy_(torch._weight_int8pack_mm(operand.value, codes, ones).T)


def _run_integer(codes: torch.Tensor, operand: Operand, out: torch.Tensor) -> None:
    packed, step = operand.value
    high, low = torch._int_mm(codes, packed).float().chunk(2, dim=1)
    torch.add(high, low, alpha=1 / 254, out=out).mul_(step)


def _anywhere(codes: torch.Tensor, batch: int) -> bool:
    return True


def _on_cpu(codes: torch.Tensor, batch: int) -> bool:
    return codes.device.type == "cpu"


_WIDENED = Product("widened", _round_query(torch.float32), _run_widened, 0.0, _anywhere)
PRODUCTS = {
    "bf16": (
        Product("bf16", _round_query(torch.bfloat16), _run_bf16, 2 * _BF16_UNIT, _anywhere),
        _WIDENED,
    ),
    "int8": (
        Product("int8 x bf16", _round_query(torch.bfloat16), _run_packed, 2 * _BF16_UNIT, _on_cpu),
        Product("int8 x 2 int8", _split_query, _run_integer, 2.0**-22, _on_cpu),
        _WIDENED,
    ),
}


def encode(
    rows: torch.Tensor, kind: str, similarity: str, mean: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Codes of rows [n, d]: the tensors of an index's low-precision copy.

    code bfloat16 or int8 [n, d padded]; float32 [n]: scale, residual, size, and half
    (|y - m|^2 / 2, for l2); trusted bool [n]: False where float32 cannot hold the numbers (the code
    of such a row is 0).
    """
    exact, trusted = _centre(rows, similarity, mean)
    if kind == "bf16":
        code = exact.bfloat16()
        scale = torch.ones(rows.shape[0], device=rows.device)
    else:
        scale = (exact.abs().amax(1) / 127).float()
        scale = torch.where(scale == 0, 1.0, scale)
        code = (exact / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    held = code.double() * scale.double()[:, None]
    return {
        "code": padded(code),
        "scale": scale,
        "residual": (torch.linalg.vector_norm(exact - held, dim=1) * _UP).float(),
        "size": (torch.linalg.vector_norm(held, dim=1) * _UP).float(),
        "half": (0.5 * exact.square().sum(1)).float(),
        "trusted": trusted,
    }


def padded(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [n, d] with zero columns up to a multiple of DIM_MULTIPLE."""
    return torch.nn.functional.pad(vectors, (0, -vectors.shape[1] % DIM_MULTIPLE))


def mean_row(rows: torch.Tensor, similarity: str) -> torch.Tensor:
    """The mean of y over trusted rows, float64 [d], by blocks."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for block in rows.split(4096):
        total += _centre(block, similarity, torch.zeros_like(total))[0].sum(0)
    return total / max(1, rows.shape[0])


def _centre(
    rows: torch.Tensor, similarity: str, mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    exact = rows.double()
    norms = torch.linalg.vector_norm(exact, dim=1)
    trusted = norms <= HUGE
    if similarity == "cosine":
        trusted &= (norms >= 1 / HUGE) | (norms == 0)
        exact = exact / torch.where(norms == 0, 1.0, norms)[:, None]
    return torch.where(trusted[:, None], exact - mean, 0.0), trusted


def scaled_queries(query: Queries) -> torch.Tensor:
    """The scaled queries in float64 [B, d]; 0 for those that float32 cannot hold."""
    exact = query.original.double() * query.scale[:, None]
    return torch.where(query.dense[:, None], 0.0, exact)


def measured_run(product: Product, codes: torch.Tensor, query: Queries) -> Callable[[int], None]:
    """A function that multiplies the first n rows of ``codes`` with a batch, for timing."""
    operand = product.prepare(padded(scaled_queries(query)))

    def run(rows: int) -> None:
        part = codes[: -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE]
        product.run(part, operand, query.scaled.new_empty(part.shape[0], query.scaled.shape[0]))

    return run


class CodePass:
    """First pass over the codes in ``fields`` (see ``encode``) by one product."""

    def __init__(
        self,
        fields: dict[str, torch.Tensor],
        mean: torch.Tensor,
        product: Product,
        query: Queries,
        height: int,
    ) -> None:
        """``fields``: live rows, the code padded to whole blocks."""
        self.fields, self.product, self.query, self.height = fields, product, query, height
        exact = scaled_queries(query)
        if query.similarity == "l2":
            exact = exact - mean
        self.name = product.name
        self.operand = product.prepare(padded(exact))
        norm = torch.linalg.vector_norm(exact, dim=1)
        used = norm + self.operand.missed
        unit = product.unit + (exact.shape[1] + 4) * 2.0**-23 + query.unit + _TINY
        trusted = fields["trusted"]
        self.trusted = bool(trusted.all())
        residual, size, high = (
            torch.where(trusted, fields[name], 0.0).max() for name in ("residual", "size", "norm")
        )
        error = norm * residual + (self.operand.missed + unit * used) * size
        if query.similarity == "l2":
            error = error + 2.0**-21 * (norm + size + residual) ** 2
        self.error = (error * _UP).float() + query.product_error(high * 1.001)

    def score(
        self, start: int, stop: int, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        field = {name: tensor[start:stop] for name, tensor in self.fields.items()}
        size = stop - start
        height = -(-size // ROW_MULTIPLE) * ROW_MULTIPLE
        whole = out if height == size else out.new_empty(height, out.shape[1])
        self.product.run(self.fields["code"][start : start + height], self.operand, whole)
        if whole is not out:
            out.copy_(whole[:size])
        if field["code"].dtype == torch.int8:
            out.mul_(field["scale"][:, None])
        if self.query.similarity == "l2":
            out.sub_(field["half"][:, None])
        if self.trusted:
            return self.error, None
        doubtful = (~field["trusted"]).nonzero()[:, 0]
        out[doubtful] = float("-inf")
        return self.error, doubtful + start if doubtful.numel() else None
