"""Implementations of linear_logprob. They never import each other."""
