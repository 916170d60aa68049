"""Several replicas under Ray Serve.

    serve run r2ec_fast.serve.ray_app:app model=DIR items_log=FILE replicas=2

A replica is a whole server: a model, a worker, a copy of the item table. What it holds follows from
the model and one log of item changes, which an actor keeps: the replica that is asked for a change
encodes it and has the actor write it; the others read the log every `FOLLOW` seconds. All make the
changes in the order of the log, so a version is the same table everywhere, and an answer says which
version it used. Extra `ray`; sizes and costs: docs/guides/serving.md.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from r2ec_fast.serve.http.app import create_app
from r2ec_fast.serve.http.guard import read_keys
from r2ec_fast.serve.numerics import ask_for_strict_products
from r2ec_fast.serve.service import Service
from r2ec_fast.serve.write_ahead import Record, WriteAheadLog

FOLLOW = 0.5  # seconds between looks for other replicas' changes


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

    def __iter__(self) -> Iterator[Record]:
        return iter(self._since(None))

    def append(self, record: Record) -> Sequence[Record]:
        return self._since(record)[:-1]

    def _since(self, record: Record | None) -> list[Record]:
        records = ray.get(self._keeper.since.remote(self._header, self._known, record))
        self._known += len(records)
        return records

    def drop_last(self) -> None:
        raise RuntimeError("others may have made the change that failed here: start this again")

    def close(self) -> None:
        """It stays open for the others."""


def build(model: str, keeper: Any, data: str | None, keys: Sequence[str]) -> FastAPI:
    """A replica's application."""
    ask_for_strict_products()
    logs: list[SharedLog] = []

    def opened(header: Record) -> SharedLog:
        logs.append(SharedLog(keeper, header))
        return logs[0]

    service = Service.from_pretrained(model, data=data, items_log=opened)

    def follow() -> None:
        while service.worker.alive:
            service.catalog.follow(lambda: logs[0])
            time.sleep(FOLLOW)

    threading.Thread(target=follow, name="r2ec-follow", daemon=True).start()
    return create_app(service, keys=keys)


def app(arguments: dict[str, str]) -> serve.Application:
    """``model`` and ``items_log`` are needed; ``data``, ``api_key_file``, ``replicas`` (default 2)
    and ``cpus`` (of a replica, default 1) may be given."""
    keeper = ray.remote(num_cpus=0, max_restarts=-1)(LogKeeper).options(
        name="r2ec-items-log", get_if_exists=True
    )
    log = keeper.remote(arguments["items_log"])
    model, data, file = arguments["model"], arguments.get("data"), arguments.get("api_key_file")
    keys = [] if file is None else read_keys(file)
    wrapped = serve.ingress(lambda: build(model, log, data, keys))()
    replicas = int(arguments.get("replicas", 2))
    return serve.deployment(
        wrapped,
        name="r2ec",
        autoscaling_config={"min_replicas": replicas, "max_replicas": 4 * replicas},
        ray_actor_options={"num_cpus": float(arguments.get("cpus", 1))},
        health_check_period_s=5,
    ).bind()
