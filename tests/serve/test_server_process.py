"""The server as a process: killed while it writes, told to leave, left by its clients."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from _support.processes import environment
from _support.serving import events

SCRIPT = Path(__file__).parents[1] / "_support" / "serve_toy.py"


class Process:
    """A server over a log file, ready when this returns."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(log), "0", *arguments],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self.port = 0
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"serving at http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        assert self.port, "".join(self.lines)
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr))
        self._reader.start()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join()
        self.client.close()
        return code


@pytest.fixture
def started(tmp_path):
    running = []

    def start(*arguments: str) -> Process:
        running.append(Process(tmp_path / "items.log", *arguments))
        return running[-1]

    yield start
    for process in running:
        if process.process.poll() is None:
            process.end(signal.SIGKILL)


def storm(process: Process, seed: int, acknowledged: dict[str, str | None], pending: dict) -> None:
    """Writes until the server dies. ``acknowledged``: titles by id as the server said they are;
    ``pending``: what the last call asked for, which may have been done or not."""
    rng = random.Random(seed)
    with contextlib.suppress(httpx.HTTPError):
        while True:
            names = rng.sample([f"n{i}" for i in range(12)], 3)
            there = [name for name in names if acknowledged.get(name)]
            pending.clear()
            if rng.random() < 0.7 or not there:
                title = f"{seed} {rng.random()}"
                pending.update(dict.fromkeys(names, title))
                body = {"items": [{"id": name, "title": title} for name in names]}
                answer = process.client.put("/v1/items", json=body)
            else:
                pending.update(dict.fromkeys(there, None))
                answer = process.client.request("DELETE", "/v1/items", json={"ids": there})
            assert answer.status_code == 200, answer.text
            acknowledged.update(pending)
            pending.clear()


def titles(process: Process) -> dict[str, str | None]:
    """Titles by id as the server has them now; and searches find just these."""
    found: dict[str, str | None] = {}
    for name in (f"n{i}" for i in range(12)):
        answer = process.client.get(f"/v1/items/{name}")
        found[name] = answer.json()["fields"]["title"] if answer.status_code == 200 else None
    body = {"history": ["i1"], "k": 100, "mode": "direct"}
    items = process.client.post("/v1/recommend", json=body).json()["items"]
    assert {i["item_id"]: i["title"] for i in items if i["item_id"].startswith("n")} == {
        name: title for name, title in found.items() if title is not None
    }
    return found


def killed_in_a_storm(started, rounds: int) -> int:
    """How many changes were acknowledged in all."""
    acknowledged: dict[str, str | None] = dict.fromkeys(f"n{i}" for i in range(12))
    rng, process = random.Random(0), started()
    for seed in range(rounds):
        pending: dict[str, str | None] = {}
        writer = threading.Thread(target=storm, args=(process, seed, acknowledged, pending))
        writer.start()
        time.sleep(rng.random() * 0.6)
        process.end(signal.SIGKILL)
        writer.join()
        process = started()
        now = titles(process)
        # the call that was cut off has been done whole, or not at all
        assert now in (acknowledged, acknowledged | pending), (acknowledged, pending, now)
        acknowledged.update(now)
    return process.client.get("/v1/items/i1").json()["table_version"]


def test_killed_while_it_writes(started):
    assert killed_in_a_storm(started, 2) > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_in_a_hundred_moments(started):
    count = killed_in_a_storm(started, 100)
    assert count > 100


def test_told_to_leave_it_answers_what_is_under_way(started):
    process = started("0.05")
    answers, ready = [], []
    body = {"history": ["i1"], "max_reasoning_tokens": 40}
    ask = threading.Thread(
        target=lambda: answers.append(process.client.post("/v1/recommend", json=body))
    )
    ask.start()
    time.sleep(0.5)
    process.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    with httpx.Client(base_url=f"http://127.0.0.1:{process.port}") as other:
        ready.append(other.get("/health/ready").status_code)
        ready.append(other.get("/health/live").status_code)
        refused = other.post("/v1/recommend", json=body)
    ask.join()
    assert ready == [503, 200]
    assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
    assert answers[0].status_code == 200 and len(answers[0].json()["items"]) == 10
    assert process.process.wait(30) == 0
    with pytest.raises(httpx.ConnectError), httpx.Client() as client:
        client.get(f"http://127.0.0.1:{process.port}/health/live")


def test_a_client_that_hangs_up_frees_the_worker(started):
    process = started("0.02")
    body = b'{"history": ["i1"], "max_reasoning_tokens": 190%s}'
    for stream in (b"", b', "stream": true'):
        with socket.create_connection(("127.0.0.1", process.port)) as raw:
            content = body % stream
            raw.sendall(
                b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
            )
            time.sleep(0.4)
            assert "vllm:num_requests_running 1.0" in process.client.get("/metrics").text
        until = time.monotonic() + 3  # 190 steps would take 4
        while "vllm:num_requests_running 0.0" not in process.client.get("/metrics").text:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_direct_answers_do_not_wait_for_reasonings(started):
    """A reasoning of 150 steps of 20 ms is under way; a direct answer takes a step or two."""
    process = started("0.02")
    body = {"history": ["i1"], "max_reasoning_tokens": 150, "stream": True}
    seen: list = []

    def read() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{process.port}", timeout=60) as other:
            seen.extend(events(other.post("/v1/recommend", json=body).text))

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.3)
    begun = time.monotonic()
    for n in range(5):
        direct = {"history": [f"i{n + 2}"], "mode": "direct"}
        assert process.client.post("/v1/recommend", json=direct).status_code == 200
    assert time.monotonic() - begun < 1.5
    assert not seen  # the reasoning still goes on
    reader.join()
    assert seen[-2][0] == "items" and seen[-2][1]["usage"]["completion_tokens"] == 150


def test_a_port_that_is_taken_and_a_log_that_is_held(started, tmp_path):
    process = started()
    for log, port, message in (
        (tmp_path / "other.log", process.port, "cannot listen at 127.0.0.1"),
        (tmp_path / "items.log", 0, "another process has it open"),
    ):
        run = subprocess.run(
            [sys.executable, str(SCRIPT), str(log), str(port)],
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert run.returncode != 0 and message in run.stderr
