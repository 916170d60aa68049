"""A table as ops read it: its rows, and the ids by which equal scores are ordered."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Table:
    """Stored rows during one call. Rows are positions; ids are what users see.

    Attributes:
        rows: [N, d], the stored values. Triton's kernels take zero columns behind them too.
        ids: int64 [N], the id of each row; None: its position.
        allowed: bool [N], the rows that are returned, or compete (``included``); None: all.
    """

    rows: torch.Tensor
    ids: torch.Tensor | None = None
    allowed: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def num_allowed(self) -> int:
        """How many rows are returned, or compete; waits for the device."""
        return len(self) if self.allowed is None else int(self.allowed.sum())

    def mask(self, start: int, stop: int, scores: torch.Tensor, value: float | int) -> None:
        """Set the scores [>= stop - start, B] of the rows start..stop-1 that are not allowed."""
        if self.allowed is not None:
            scores[: stop - start].masked_fill_(~self.allowed[start:stop, None], value)

    def allowed_among(self, rows: torch.Tensor) -> torch.Tensor:
        """Those of the row positions [M] that are allowed."""
        return rows if self.allowed is None else rows[self.allowed[rows]]

    def ids_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The ids of row positions, of any shape."""
        return rows if self.ids is None else self.ids[rows]

    def before(self, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Whether each row's id is lower than its target's; both are row positions."""
        return self.ids_of(rows) < self.ids_of(targets)
