"""Implementations of target_stats. They never import each other."""
