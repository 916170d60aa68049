"""The body of the op item_topk: choose the implementation and run it."""

import torch

from .. import dispatch
from ..exclude import Exclude
from . import impl_torch, reference

_AVAILABLE = frozenset({"triton", "torch", "reference"})


def item_topk(
    queries: torch.Tensor,
    items: torch.Tensor,
    k: int,
    similarity: str,
    temperature: float,
    exclude: Exclude,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores float32 [B, k] and indices int64 [B, k] by the implementation that ``impl`` names."""
    name = dispatch.resolve(impl, items.device, "item_topk", _AVAILABLE)
    if dispatch.checks_enabled():
        for argument, vectors in (("queries", queries), ("items", items)):
            if not bool(torch.isfinite(vectors).all()):
                raise ValueError(f"{argument}: expected finite values, got NaN or infinity")
    if name == "triton":
        from . import impl_triton

        return impl_triton.item_topk(queries, items, k, similarity, temperature, exclude)
    compute = reference.item_topk if name == "reference" else impl_torch.item_topk
    return compute(queries, items, k, similarity, temperature, exclude)
