"""Exact top-K over a table."""
