"""Error bounds of a coarse scan (derivation: docs/kernels/search.md).

A coarse scan ranks items by a *raw score* g(q, x), an increasing function of the canonical score
for a fixed query:  dot: q.x    cosine: q.x / |x|    l2: q.x - |x|^2 / 2.
It computes an approximation with |g' - g| <= ``unit`` * size(q, x) + ``floor``, where size is
|q| |x| for dot, |q| for cosine and (|q| + |x|)^2 for l2. The bounds below include the rounding of
the canonical score itself, so that an item whose upper bound lies below another's lower bound
cannot even tie with it.
"""

from dataclasses import dataclass, replace

import torch

from .._numbers import HUGE, UNIT

_SAFETY = 1.01  # second-order terms and float32 norms


@dataclass(frozen=True)
class Queries:
    """A batch prepared for coarse scans.

    Attributes:
        original: [B, d], as given; canonical scores are taken from it.
        scaled: float32 [B, d]; for dot and cosine scaled by a power of two to a norm near 1.
        scale: float64 [B], ``scaled = original * scale``.
        norm: float32 [B], upper bound of the norm of ``scaled``.
        unit: relative error of a float32 product of the rows, canonical rounding included.
        rounding: the part of it that does not depend on the rows' product: canonical rounding, and
            TF32 or bfloat16 inside float32 products.
        floor: float32 [B], absolute error where numbers leave float32's normal range.
        dense: bool [B], queries whose norm float32 cannot hold: they take the dense path.
        similarity, temperature: of the search.
    """

    original: torch.Tensor
    scaled: torch.Tensor
    scale: torch.Tensor
    norm: torch.Tensor
    unit: float
    rounding: float
    floor: torch.Tensor
    dense: torch.Tensor
    similarity: str
    temperature: float

    def product_error(self, row_norm: torch.Tensor) -> torch.Tensor:
        """Error bound [B] of a float32 scan of rows with norms of at most ``row_norm`` []."""
        return self.unit * self._size(row_norm) + self.floor

    def rounding_error(self, row_norm: torch.Tensor) -> torch.Tensor:
        """The part [B] of ``product_error`` that a scan with its own bound has to add to it."""
        return self.rounding * self._size(row_norm) + self.floor

    def exact(self) -> torch.Tensor:
        """The scaled queries in float64 [B, d]; 0 for those that float32 cannot hold."""
        scaled = self.original.double() * self.scale[:, None]
        return torch.where(self.dense[:, None], 0.0, scaled)

    def _size(self, row_norm: torch.Tensor) -> torch.Tensor:
        if self.similarity == "cosine":
            return self.norm
        if self.similarity == "l2":
            return (self.norm + row_norm) ** 2
        return self.norm * row_norm

    def __getitem__(self, chosen: torch.Tensor) -> "Queries":
        """The queries picked by a bool or index tensor."""
        picked = {
            name: getattr(self, name)[chosen]
            for name in ("original", "scaled", "scale", "norm", "floor", "dense")
        }
        return replace(self, **picked)


def prepare_queries(queries: torch.Tensor, similarity: str, temperature: float) -> Queries:
    """Scale a batch [B, d] for coarse scans and bound their errors."""
    d = queries.shape[1]
    exact = queries.double()
    norm = torch.linalg.vector_norm(exact, dim=1)
    dense = ~((norm <= HUGE) & ((norm >= 1 / HUGE) | (norm == 0)))
    if not 1 / HUGE <= temperature <= HUGE:
        dense = torch.ones_like(dense)
    if similarity == "l2":
        scale = torch.ones_like(norm)
    else:
        safe = torch.where(dense | (norm == 0), 1.0, norm)
        scale = torch.exp2(-torch.floor(torch.log2(safe)))
    scaled = (exact * scale[:, None]).float()
    scaled = torch.where(dense[:, None], 0.0, scaled)
    norm = torch.where(dense, 0.0, norm * scale * _SAFETY).float()
    product = _product_unit(queries.device)
    unit = float32_unit(d, similarity) + _SAFETY * product
    rounding = _SAFETY * ((4 if similarity == "l2" else 2) * 2 * UNIT + product)
    # Products below float32's normal range may be flushed to zero (cosine: then multiplied by
    # 1/|x| <= HUGE), and the canonical score rounds to a multiple of 2^-149.
    flushed = d * 2.0**-126 * (2 * HUGE if similarity == "cosine" else 4)
    rounded = temperature * 2.0**-148 * (4 * HUGE if similarity == "l2" else 2)
    floor = flushed + rounded * scale.clamp_min(1.0)
    return Queries(
        original=queries,
        scaled=scaled,
        scale=scale,
        norm=norm,
        unit=unit,
        rounding=rounding,
        floor=floor.float(),
        dense=dense,
        similarity=similarity,
        temperature=temperature,
    )


def float32_unit(d: int, similarity: str) -> float:
    """Relative error of a float32 product over d columns, canonical rounding included.

    dot: (d + 2) u for the product, 2 u for two canonical roundings; cosine: the float32 norm and
    its reciprocal add d/2 + 4; l2: the squared norm adds 2, its own sum the rest.
    """
    terms = 1.5 * d + 12 if similarity == "cosine" else d + 10
    return _SAFETY * terms * UNIT


def narrow_products(device: torch.device) -> bool:
    """Whether the user allows TF32 or bfloat16 inside float32 products."""
    return _product_unit(device) > 0


def _product_unit(device: torch.device) -> float:
    """Extra relative error of float32 products where the user allows TF32 or bfloat16 inside."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision = backend.matmul.fp32_precision
    return {"ieee": 0.0, "none": 0.0}.get(precision, 2.0**-7)
