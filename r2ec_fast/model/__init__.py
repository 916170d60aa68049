"""The dual-head model: a causal language model whose states also score a catalog."""

from r2ec_fast.model.r2ec import R2ecModel

__all__ = ["R2ecModel"]
