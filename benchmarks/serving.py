"""Serving under load: open-loop Poisson arrivals at our server and at a plain one, in turns.

    python benchmarks/serving.py --model DIR [--servers ours] [--repeats 2] [--json FILE]

Both servers are started here, one after the other never together: a server that waits would still
hold its threads. For each mix of requests

    direct      no reasoning
    reasoned    at most --tokens tokens
    mixed       nine direct to one reasoned; and the same direct requests at the same moments alone

the most answers a second are found first (as many clients as the server batches, each asking again
at once), then requests arrive by a Poisson process at given shares of OUR most, whether or not the
ones before have been answered. Every history is another one, so that no state is known already.
Goodput counts answers within the deadline: five times the plain server's time for one request
alone. Times are the client's, of requests that were answered; a refused or failed one is a miss.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import machine

HERE = Path(__file__).resolve().parent
MIXES = ("direct", "reasoned", "mixed")
DIRECT_OF_MIXED = "mixed without its reasonings"
SHARES = (0.3, 0.8, 1.2)  # of our most answers a second
CLIENTS = 16
SERVERS = ("ours", "plain")
WARM_UP = 3  # requests


@dataclass
class Load:
    """What came of one server under one load.

    Attributes:
        rate: requests a second that arrived; 0: as many as the server answers (CLIENTS clients).
        answered: answers a second.
        goodput: answers a second within the deadline.
        seconds: percentiles of the time of an answer, by mode: "direct" and "reasoned".
    """

    server: str
    mix: str
    share: float
    rate: float
    asked: int
    failed: int
    answered: float
    goodput: float
    deadline: float
    seconds: dict[str, dict[str, float]]


class Requests:
    """Requests of one mix over a catalog, all different, the same for both servers."""

    def __init__(self, items: list[str], mix: str, tokens: int, seed: int) -> None:
        self._items, self._mix, self._tokens = items, mix, tokens
        self._random = random.Random(seed)
        self._count = 0

    def next(self) -> dict:
        self._count += 1
        reasoned = self._mix == "reasoned" or (self._mix == "mixed" and self._count % 10 == 0)
        length = self._random.randint(3, 8)
        return {
            "history": self._random.sample(self._items, length),
            "k": 10,
            "mode": "reasoned" if reasoned else "direct",
            "max_reasoning_tokens": self._tokens,
        }


@contextmanager
def running(server: str, model: str, port: int) -> Iterator[str]:
    """A server of its own process; yields its address when it is ready."""
    command = [sys.executable, str(HERE / "plain_server.py"), "--model", model]
    if server == "ours":
        command = ["r2ec-fast", "serve", "--model", model, "--items_log", "null"]
        command += ["--cache_entries", "0"]
    process = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            try:
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.1)
            if process.poll() is not None:
                raise RuntimeError(f"{server}: the server has ended with {process.returncode}")
        yield url
    finally:
        process.terminate()
        process.wait(60)


async def ask(client: httpx.AsyncClient, body: dict, out: list) -> None:
    """One request; appends (mode, seconds or None)."""
    begun = time.monotonic()
    try:
        answer = await client.post("/v1/recommend", json=body)
        fine = answer.status_code == 200 and len(answer.json()["items"]) == body["k"]
    except httpx.HTTPError:
        fine = False
    out.append((body["mode"], time.monotonic() - begun if fine else None))


async def saturated(url: str, requests: Requests, seconds: float) -> tuple[list, float]:
    """CLIENTS clients that ask again and again."""
    out: list = []
    begun = time.monotonic()

    async def one(client: httpx.AsyncClient) -> None:
        while time.monotonic() - begun < seconds:
            await ask(client, requests.next(), out)

    async with _client(url) as client:
        await asyncio.gather(*(one(client) for _ in range(CLIENTS)))
    return out, time.monotonic() - begun


async def arriving(
    url: str, requests: Requests, rate: float, seconds: float, seed: int, reasoned: bool = True
):
    """Requests at the moments of a Poisson process, whatever has become of those before; the
    reasoned ones are left out where ``reasoned`` is False."""
    out: list = []
    clock, tasks = random.Random(seed), []
    begun = time.monotonic()
    at = 0.0
    async with _client(url) as client:
        while (at := at + clock.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, begun + at - time.monotonic()))
            body = requests.next()
            if reasoned or body["mode"] == "direct":
                tasks.append(asyncio.create_task(ask(client, body, out)))
        _, late = await asyncio.wait(tasks, timeout=max(30.0, 2 * seconds)) if tasks else ((), ())
        for task in late:
            task.cancel()
        out += [("late", None)] * len(late)
    return out, time.monotonic() - begun


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=1000, max_keepalive_connections=1000)
    return httpx.AsyncClient(base_url=url, timeout=120, limits=limits)


def summary(server, mix, share, rate, results, seconds, deadline) -> Load:
    times = [(mode, taken) for mode, taken in results if taken is not None]
    percentiles = {}
    for mode in ("direct", "reasoned"):
        own = sorted(taken for kind, taken in times if kind == mode)
        if own:
            percentiles[mode] = {
                f"p{p}": own[min(len(own) - 1, int(len(own) * p / 100))] for p in (50, 95, 99)
            }
    return Load(
        server=server,
        mix=mix,
        share=share,
        rate=rate,
        asked=len(results),
        failed=len(results) - len(times),
        answered=len(times) / seconds,
        goodput=sum(taken <= deadline for _, taken in times) / seconds,
        deadline=deadline,
        seconds=percentiles,
    )


def alone(url: str, requests: Requests) -> float:
    """Median seconds of requests one after the other."""
    taken = []
    with httpx.Client(base_url=url, timeout=120) as client:
        for _ in range(WARM_UP + 7):
            begun = time.monotonic()
            client.post("/v1/recommend", json=requests.next()).raise_for_status()
            taken.append(time.monotonic() - begun)
    return statistics.median(taken[WARM_UP:])


def run(options: argparse.Namespace) -> list[Load]:
    from r2ec_fast.data.store import load_catalog

    items = [str(item) for item in load_catalog(Path(options.model) / "catalog.parquet").ids.ids]
    loads: list[Load] = []
    for mix in options.mixes:
        most: dict[str, float] = {}
        deadline = 0.0
        for server in reversed(options.servers):  # the plain one first: its time makes the deadline
            with running(server, options.model, options.port) as url:
                make = lambda seed, mix=mix: Requests(items, mix, options.tokens, seed)  # noqa: E731
                one = alone(url, make(0))
                deadline = deadline or options.deadline or 5 * one
                results, taken = asyncio.run(saturated(url, make(1), options.seconds))
                loads.append(summary(server, mix, 0, 0, results, taken, deadline))
                most[server] = loads[-1].answered
                print(f"{mix}, {server}: {one * 1e3:.0f} ms alone, at most {most[server]:.2f}/s")
        for repeat in range(options.repeats):
            for server in options.servers:
                with running(server, options.model, options.port) as url:
                    alone(url, make(0))
                    for share in options.shares:
                        rate = share * most["ours"]
                        for name in (mix, DIRECT_OF_MIXED) if mix == "mixed" else (mix,):
                            asked, whole = make(2 + repeat), name == mix
                            results, taken = asyncio.run(
                                arriving(url, asked, rate, options.seconds, repeat, whole)
                            )
                            loads.append(
                                summary(server, name, share, rate, results, taken, deadline)
                            )
                            print(line(loads[-1]), flush=True)
    return loads


def line(load: Load) -> str:
    times = "; ".join(
        f"{mode} p50 {p['p50'] * 1e3:.0f} p95 {p['p95'] * 1e3:.0f} p99 {p['p99'] * 1e3:.0f} ms"
        for mode, p in load.seconds.items()
    )
    return (
        f"{load.mix}, {load.server} at {load.share:.0%} of our most ({load.rate:.2f}/s): {times}; "
        f"goodput {load.goodput:.2f}/s of {load.deadline * 1e3:.0f} ms, {load.failed} failed"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="directory that a training run exported")
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32, help="longest reasoning")
    parser.add_argument("--deadline", type=float, help="seconds; default: 5 x the plain server's")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{machine._cpu_name()}, {os.cpu_count()} CPUs")
    loads = run(options)
    if options.json:
        options.json.write_text(json.dumps([asdict(load) for load in loads], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
