"""item_topk on the tensor cores: a scan of groups of rows, then certainty (``topk``)."""

from .topk import aot_configs, item_topk, search

__all__ = ["aot_configs", "item_topk", "search"]
