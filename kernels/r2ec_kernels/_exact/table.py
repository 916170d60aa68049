"""A table as ops read it: its rows, and the ids by which equal scores are ordered."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Table:
    """Stored rows during one call. Rows are positions; ids are what users see.

    Attributes:
        rows: [N, d], the stored values.
        ids: int64 [N], the id of each row; None: its position.
    """

    rows: torch.Tensor
    ids: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.rows.shape[0]

    def ids_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The ids of row positions, of any shape."""
        return rows if self.ids is None else self.ids[rows]

    def before(self, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Whether each row's id is lower than its target's; both are row positions."""
        return self.ids_of(rows) < self.ids_of(targets)
