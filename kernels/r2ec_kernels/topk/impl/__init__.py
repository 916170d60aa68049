"""Implementations of item_topk. They never import each other."""
