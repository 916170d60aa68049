"""What clients see when a replica, or a shard of the table, is killed under load.

    python benchmarks/ray_failures.py --model DIR [--kill replica|shard] [--seconds 90]

Starts Ray on this machine with two replicas of the service (`r2ec_fast.serve.ray_app`), and with
two shards where a shard is to die. ``--clients`` clients ask for direct recommendations, each again
at once. After a third of the time one process is killed with SIGKILL. Counted: requests that
failed, the longest wait of one that did not, and the seconds until as many ran again as before.
Needs the extras `serve` and `ray`.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

NAMES = {"replica": "ServeReplica:", "shard": "Shard"}
START, RECOVERY = 300.0, 180.0  # seconds at most
PORT = 8017


class Clients:
    """Threads that ask until they are stopped."""

    def __init__(self, url: str, items: list[str], count: int) -> None:
        self._url, self._items = url, items
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.statuses: Counter[str] = Counter()
        self.longest = 0.0  # seconds of a request that was answered
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(count)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        asked = 0
        while not self._over.is_set():
            place = (97 * number + asked) % len(self._items)
            asked += 1
            history = [self._items[place], self._items[(place + 7) % len(self._items)]]
            body = {"history": history, "mode": "direct", "k": 10}
            began = time.monotonic()
            try:
                answer = httpx.post(f"{self._url}/v1/recommend", json=body, timeout=60)
                status = str(answer.status_code)
                if status == "200" and len(answer.json()["items"]) != 10:
                    status = "200 without ten items"
            except httpx.HTTPError as error:
                status = type(error).__name__
            with self._lock:
                self.statuses[status] += 1
                if status == "200":
                    self.longest = max(self.longest, time.monotonic() - began)


def living(kind: str) -> dict[str, int]:
    """Process ids of the actors of a kind that are alive, by actor."""
    from ray.util.state import list_actors

    found = list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
    return {one.actor_id: one.pid for one in found if one.class_name.startswith(NAMES[kind])}


def wait_for(what: Callable[[], bool], seconds: float) -> float:
    """Seconds until ``what``; raises TimeoutError."""
    began = time.monotonic()
    while not what():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"not within {seconds:.0f} s")
        time.sleep(0.2)
    return time.monotonic() - began


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def whole_again(kind: str, before: dict[str, int]) -> bool:
    """Whether another process took the place of the one that was killed, and two replicas serve."""
    from ray import serve

    now = living(kind)
    killed = next(iter(before.values()))
    (deployment,) = serve.status().applications["default"].deployments.values()
    serving = deployment.replica_states.get("RUNNING", 0)
    return killed not in now.values() and len(now) >= len(before) and serving >= 2


def trial(settings: argparse.Namespace, folder: str) -> dict[str, Any]:
    import ray
    from ray import serve

    from r2ec_fast.data.store import load_catalog
    from r2ec_fast.serve.ray_app import app

    items = [str(item) for item in load_catalog(settings.model / "catalog.parquet").ids.ids]
    ray.init(num_cpus=4, include_dashboard=True, log_to_driver=False)
    serve.start(http_options={"port": PORT})
    arguments = {"model": str(settings.model.resolve()), "items_log": f"{folder}/items.log"}
    if settings.kill == "shard":
        arguments["shards"] = "2"
    serve.run(app(arguments | {"replicas": "2", "cpus": "0.5"}))
    url = f"http://127.0.0.1:{PORT}"
    wait_for(lambda: answers(url) and len(living("replica")) == 2, START)
    with Clients(url, items, settings.clients) as clients:
        time.sleep(settings.seconds / 3)
        before = living(settings.kill)
        os.kill(next(iter(before.values())), signal.SIGKILL)
        recovery = wait_for(lambda: whole_again(settings.kill, before), RECOVERY)
        time.sleep(settings.seconds / 3)
    serve.shutdown()
    ray.shutdown()
    failed = sum(count for status, count in clients.statuses.items() if status != "200")
    return {
        "killed": settings.kill,
        "requests": sum(clients.statuses.values()),
        "failed": failed,
        "statuses": dict(clients.statuses),
        "longest_answered_seconds": round(clients.longest, 2),
        "recovery_seconds": round(recovery, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--kill", choices=sorted(NAMES), default="replica")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = trial(settings, folder)
    text = json.dumps(found, indent=1)
    print(text)
    if settings.json:
        settings.json.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
