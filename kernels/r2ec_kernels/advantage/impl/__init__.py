"""Implementations of rewards and advantages. They never import each other."""
