"""A table as the caller holds it."""

import torch


class PlainTable:
    """A table [N, d]; ids are positions."""

    ids = None

    def __init__(self, items: torch.Tensor) -> None:
        self.rows = items
