"""The coarse scan of a table in blocks, and the exact re-scoring of what it leaves."""
