"""The body of the op target_stats: choose the implementation and run it."""

import importlib

import torch

from ..dispatch import resolve
from ..exclude import Exclude, normalize_exclude

AVAILABLE = frozenset({"triton", "torch", "reference"})


def target_stats(
    queries: torch.Tensor,
    items: torch.Tensor,
    targets: torch.Tensor,
    similarity: str,
    temperature: float,
    exclude: Exclude,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank int64 [B], log_prob float32 [B]) by the implementation that ``impl`` names."""
    name = resolve(impl, queries.device, "target_stats", AVAILABLE)
    values, offsets = normalize_exclude(exclude, queries.shape[0], items.shape[0], queries.device)
    room = importlib.import_module(
        f".impl_{name}" if name != "reference" else ".reference", __package__
    )
    return room.target_stats(queries, items, targets, similarity, temperature, values, offsets)
