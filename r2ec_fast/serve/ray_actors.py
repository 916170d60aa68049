"""The actors beside the replicas of `ray_app`: the log of item changes, and parts of the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from r2ec_fast.model.pretrained import INDEX_FILE
from r2ec_fast.serve.catalog.records import of_record
from r2ec_fast.serve.catalog.sharded import TableShard
from r2ec_fast.serve.catalog.write_ahead import Record, WriteAheadLog
from r2ec_kernels import ItemIndex


class LogKeeper:
    """The one process that has the log open; one that is started again reads the file again."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._log: WriteAheadLog | None = None
        self._records: list[Record] = []

    def since(self, header: Record, known: int, record: Record | None = None) -> list[Record]:
        """The records behind the first ``known``, after ``record`` has been appended, if any.
        Raises ValueError where the log is that of another table than ``header`` says."""
        if self._log is None:
            self._log = WriteAheadLog(self._path, header)
            self._records = list(self._log)
        if record is not None:
            self._log.append(record)
            self._records.append(record)
        return self._records[known:]


class SharedLog:
    """The keeper's log as a replica sees it."""

    def __init__(self, keeper: Any, header: Record) -> None:
        self._keeper, self._header, self._known = keeper, header, 0
        self._missed = False

    def __iter__(self) -> Iterator[Record]:
        return iter(self._since(None))

    def append(self, record: Record) -> Sequence[Record]:
        return self._since(record)[:-1]

    def news(self) -> Sequence[Record]:
        return self._since(None)

    def rows_since(self, known: int) -> Iterator[torch.Tensor | None]:
        """The rows of every record behind the first ``known``."""
        records = ray.get(self._keeper.since.remote(self._header, known))
        return (of_record(record)[1] for record in records)

    def _since(self, record: Record | None) -> list[Record]:
        if self._missed:
            raise RuntimeError("a change that others have made could not be made here")
        records = ray.get(self._keeper.since.remote(self._header, self._known, record))
        self._known += len(records)
        return records

    def drop_last(self) -> None:
        """Others may have made the change that failed here: this process cannot go on."""
        self._missed = True

    def close(self) -> None:
        """It stays open for the others."""


class Shard(TableShard):
    """An actor with a part of a model's item table."""

    def __init__(self, model: str, shard: int, shards: int) -> None:
        super().__init__(ItemIndex.load(Path(model) / INDEX_FILE), shard, shards)


def ask(shards: Sequence[Any], method: str, arguments: dict[int, tuple[Any, ...]]) -> dict:
    """Call a method of actors by their number, all at once."""
    calls = [getattr(shards[i], method).remote(*own) for i, own in arguments.items()]
    return dict(zip(arguments, ray.get(calls), strict=True))
