"""Several replicas under Ray Serve.

    serve run r2ec_fast.serve.ray_app:app model=DIR items_log=FILE replicas=2 shards=0

A replica is a whole server: a model, a worker, a copy of the item table, or, with ``shards``, its
way to the actors that have a part of the table each. What it holds follows from the model and one
log of item changes, which an actor keeps: the replica that is asked for a change encodes it and has
the actor write it; the others read the log every `FOLLOW` seconds. All make the changes in the
order of the log, so a version is the same table everywhere, and an answer says which version it
used. Extra `ray`; sizes and costs: docs/guides/serving.md.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError

from r2ec_fast.serve.catalog.sharded import ShardedTable
from r2ec_fast.serve.catalog.table import LiveTable, LocalTable
from r2ec_fast.serve.catalog.write_ahead import Record
from r2ec_fast.serve.http.app import create_app
from r2ec_fast.serve.http.guard import read_keys
from r2ec_fast.serve.numerics import ask_for_strict_products
from r2ec_fast.serve.ray_actors import LogKeeper, Shard, SharedLog, ask
from r2ec_fast.serve.service import Service
from r2ec_kernels import ItemIndex

log = logging.getLogger(__name__)

FOLLOW = 0.5  # seconds between looks for other replicas' changes


def build(
    model: str, keeper: Any, shards: Sequence[Any], data: str | None, keys: Sequence[str]
) -> FastAPI:
    """A replica's application."""
    ask_for_strict_products()
    logs: list[SharedLog] = []

    def opened(header: Record) -> SharedLog:
        logs.append(SharedLog(keeper, header))
        return logs[0]

    def table(index: ItemIndex) -> LiveTable:
        if not shards:
            return LocalTable(index)
        return ShardedTable(index, len(shards), partial(ask, shards), logs[0].rows_since)

    service = Service.from_pretrained(model, data=data, items_log=opened, table=table)

    def follow() -> None:
        while service.worker.alive:
            try:
                service.catalog.follow()
            except RayError as error:
                log.warning("the log of item changes does not answer: %s", error)
            except Exception:
                log.exception("this replica missed a change of the items; Ray starts another one")
                os._exit(1)
            time.sleep(FOLLOW)

    threading.Thread(target=follow, name="r2ec-follow", daemon=True).start()
    return create_app(service, keys=keys)


def app(arguments: dict[str, str]) -> serve.Application:
    """``model`` and ``items_log`` are needed; ``data``, ``api_key_file``, ``replicas`` (default 2),
    ``shards`` (default 0: every replica has the table) and ``cpus`` (of a replica or a shard,
    default 1) may be given."""
    model, data, file = arguments["model"], arguments.get("data"), arguments.get("api_key_file")
    cpus, count = float(arguments.get("cpus", 1)), int(arguments.get("shards", 0))
    keeper = ray.remote(num_cpus=0, max_restarts=-1)(LogKeeper)
    changes = keeper.options(name="r2ec-items-log", get_if_exists=True)
    kept = changes.remote(arguments["items_log"])
    lasting = {"num_cpus": cpus, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": 8}
    part = ray.remote(**lasting)(Shard)
    shards = [
        part.options(name=f"r2ec-shard-{i}", get_if_exists=True).remote(model, i, count)
        for i in range(count)
    ]
    keys = [] if file is None else read_keys(file)
    replicas = int(arguments.get("replicas", 2))
    return serve.deployment(
        serve.ingress(lambda: build(model, kept, shards, data, keys))(),
        name="r2ec",
        autoscaling_config={"min_replicas": replicas, "max_replicas": 4 * replicas},
        ray_actor_options={"num_cpus": cpus},
        health_check_period_s=5,
    ).bind()
