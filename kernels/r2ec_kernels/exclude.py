"""Excluded items of a batch, in one form: values [E] and offsets [B+1]."""

import torch

from .dispatch import checks_enabled

Exclude = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None


def split_exclude(exclude: Exclude) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``exclude`` as two optional tensors (values, offsets): the form an op takes."""
    if exclude is None:
        return None, None
    if isinstance(exclude, torch.Tensor):
        return exclude, None
    if isinstance(exclude, (tuple, list)) and len(exclude) == 2:
        return exclude[0], exclude[1]
    raise TypeError(
        "exclude: expected None, a padded int64 tensor [B, L] or a pair (values [E], offsets "
        f"[B+1]), got {type(exclude).__name__}"
    )


def check_exclude(exclude: Exclude, batch: int) -> None:
    """Check types and shapes (not values) of ``exclude`` for a batch of ``batch`` rows."""
    values, offsets = split_exclude(exclude)
    if values is None:
        return
    for name, tensor in (("exclude", values), ("exclude offsets", offsets)):
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected int64, got {tensor.dtype}")
    if offsets is None:
        if values.dim() != 2 or values.shape[0] != batch:
            raise ValueError(f"exclude: expected shape [{batch}, L], got {list(values.shape)}")
    elif values.dim() != 1 or offsets.dim() != 1 or offsets.shape[0] != batch + 1:
        raise ValueError(
            f"exclude: expected (values [E], offsets [{batch + 1}]), got shapes "
            f"{list(values.shape)} and {list(offsets.shape)}"
        )


def normalize_exclude(
    exclude: Exclude, batch: int, num_items: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Excluded ids of each row as (values int64 [E], offsets int64 [B+1]) on ``device``.

    Args:
        exclude: None; padded ids [B, L] with -1 for "none" anywhere in a row, repeats allowed; or
            the pair (values, offsets), where row b owns ``values[offsets[b]:offsets[b+1]]``.
        batch: B.
        num_items: ids must lie in -1..num_items-1. Ids that live on a GPU are checked only under
            ``R2EC_CHECK=1``, because the check waits for the device.

    Raises:
        TypeError, ValueError: wrong type, shape or range.
    """
    check_exclude(exclude, batch)
    values, offsets = split_exclude(exclude)
    if values is None:
        zero = torch.zeros(batch + 1, dtype=torch.int64, device=device)
        return torch.empty(0, dtype=torch.int64, device=device), zero
    check = values.device.type == "cpu" or checks_enabled()
    if check and values.numel() and (values.min() < -1 or values.max() >= num_items):
        low, high = int(values.min()), int(values.max())
        raise ValueError(
            f"exclude: expected ids in -1..{num_items - 1}, got values in {low}..{high}"
        )
    values = values.to(device=device, dtype=torch.int64)
    if offsets is None:
        kept = values >= 0
        counts = kept.sum(1)
        values = values[kept]
    else:
        offsets = offsets.to(device=device, dtype=torch.int64)
        if check:
            _check_offsets(offsets, values.numel())
        kept = values >= 0
        running = torch.zeros(values.numel() + 1, dtype=torch.int64, device=device)
        torch.cumsum(kept, 0, out=running[1:])
        counts = running[offsets].diff()
        values = values[kept]
    start = torch.zeros(batch + 1, dtype=torch.int64, device=device)
    torch.cumsum(counts, 0, out=start[1:])
    return values, start


def exclude_rows(offsets: torch.Tensor, num_values: int) -> torch.Tensor:
    """Row of each excluded value: offsets [B+1] -> int64 [E]."""
    rows = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=num_values)


def _check_offsets(offsets: torch.Tensor, num_values: int) -> None:
    bounds = int(offsets[0]), int(offsets[-1])
    if bounds != (0, num_values) or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"exclude offsets: expected a non-decreasing sequence from 0 to {num_values}, "
            f"got {bounds[0]} .. {bounds[1]}"
        )
