"""The one collective of a sharded search."""

import torch
import torch.distributed as dist


def gather_keys(keys: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """All ranks' order keys side by side: int64 [B, k] -> [B, ranks * k]."""
    if not dist.is_initialized():
        raise RuntimeError("sharded_topk: torch.distributed is not initialised in this process")
    ranks = dist.get_world_size(group)
    parts = [torch.empty_like(keys) for _ in range(ranks)]
    dist.all_gather(parts, keys.contiguous(), group=group)
    return torch.cat(parts, dim=1)
