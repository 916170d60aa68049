"""Interactions split into training, validation and test examples: what every later stage takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from r2ec_fast.data.store import Parts, load_dataset, save_dataset
from r2ec_fast.data.types import Examples, History, InteractionData

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class RecDataset:
    """Interactions split into training, validation and test examples.

    Args:
        data: the events of all users, all splits.
        train, valid, test: disjoint examples, each in time order where times exist.
        settings: how the data was loaded and split; plain JSON values.
    """

    data: InteractionData
    train: Examples
    valid: Examples
    test: Examples
    settings: dict[str, Any] = field(default_factory=dict)

    def history(self, user: int, position: int, window: int | None = None) -> History:
        """The last `window` events (None: all) of internal `user` before event `position`.

        `position` may be the number of the user's events: everything known, nothing to predict.
        """
        data = self.data
        if not 0 <= user < data.num_users:
            raise IndexError(f"user: expected 0..{data.num_users - 1}, got {user}")
        first, last = int(data.offsets[user]), int(data.offsets[user + 1])
        if not 1 <= position <= last - first:
            raise IndexError(
                f"position: expected 1..{last - first} for user {user}, got {position}"
            )
        if window is not None and window < 1:
            raise ValueError(f"window: expected >= 1 events or None, got {window}")
        end = first + position
        begin = first if window is None else max(first, end - window)
        times = data.timestamp
        return History(
            items=data.item[begin:end],
            timestamps=None if times is None else times[begin:end],
            ratings=None if data.rating is None else data.rating[begin:end],
            target_time=int(times[end]) if times is not None and end < last else None,
        )

    def target(self, examples: Examples) -> np.ndarray:
        """[X] int64 internal ids of the items to predict."""
        return self.data.item[self.data.offsets[examples.user] + examples.position]

    def target_time(self, examples: Examples) -> np.ndarray | None:
        """[X] int64 unix seconds of the events to predict; None where the data has no times."""
        times = self.data.timestamp
        return (
            None if times is None else times[self.data.offsets[examples.user] + examples.position]
        )

    def exclude(
        self, examples: Examples, window: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Items not to be ranked: all earlier events of the user, or the last `window` of them.

        Returns:
            values int64 [E] internal item ids (repeats stay), offsets int64 [X+1].
        """
        import torch  # here, so that preparing files never pays for it

        if window is not None and window < 1:
            raise ValueError(f"window: expected >= 1 events or None, got {window}")
        count = examples.position if window is None else np.minimum(examples.position, window)
        offsets = np.zeros(len(examples) + 1, dtype=np.int64)
        np.cumsum(count, out=offsets[1:])
        begin = self.data.offsets[examples.user] + examples.position - count
        index = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], count)
        return torch.from_numpy(self.data.item[index]), torch.from_numpy(offsets)

    def save(
        self,
        directory: str | Path,
        extra: Mapping[str, bytes] | None = None,
        argument: str = "directory",
    ) -> None:
        """Write Parquet tables and manifest.json into `directory`, all or nothing.

        Args:
            directory: created; must not be a directory of something else.
            extra: further files by name, e.g. a report and its picture.
            argument: what the caller calls `directory`, for messages.
        """
        parts = Parts(self.data, self.train, self.valid, self.test, self.settings)
        save_dataset(parts, directory, extra, argument)

    @classmethod
    def load(cls, directory: str | Path) -> RecDataset:
        """Read what `save` wrote; raises ValueError for a directory that is not a whole dataset."""
        return cls(*load_dataset(directory))
