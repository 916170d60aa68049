"""The process: load, listen, and leave when asked, with every request answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time

import uvicorn
from fastapi import FastAPI

from r2ec_fast.serve.http.guard import State

log = logging.getLogger(__name__)

DRAIN_LEAST = 1.0  # seconds in which load balancers see that the server is not ready


class Server(uvicorn.Server):
    """uvicorn that goes in two steps: first /health/ready says 503 and new recommendations are
    refused while those under way are answered, then it closes."""

    def __init__(self, config: uvicorn.Config, state: State, drain_seconds: float) -> None:
        super().__init__(config)
        self.state, self.drain_seconds = state, drain_seconds
        self.began = time.monotonic()

    @contextlib.contextmanager
    def capture_signals(self):
        loop = asyncio.get_running_loop()
        handled = (signal.SIGTERM, signal.SIGINT)
        for number in handled:
            loop.add_signal_handler(number, self._asked_to_leave)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            log.info("serving at http://%s:%d", self.config.host, self._port())

    def _port(self) -> int:
        return self.servers[0].sockets[0].getsockname()[1] if self.servers else self.config.port

    def _asked_to_leave(self) -> None:
        if self.state.draining:  # asked again: at once
            self.should_exit = self.force_exit = True
            return
        log.info("shutting down: requests under way are answered, new ones are refused")
        self.state.draining = True
        self._leaving = asyncio.get_running_loop().create_task(self._leave())

    async def _leave(self) -> None:
        begun = time.monotonic()
        while (passed := time.monotonic() - begun) < self.drain_seconds:
            if passed >= min(DRAIN_LEAST, self.drain_seconds) and not self.state.under_way:
                break
            await asyncio.sleep(0.05)
        self.should_exit = True


def run(app: FastAPI, state: State, *, host: str, port: int, drain_seconds: float) -> None:
    """Serve until SIGTERM or SIGINT. OSError where the port cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    own = socket.socket(family, socket.SOCK_STREAM)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        own.bind((host, port))
    except OSError as error:
        own.close()
        raise OSError(
            error.errno, f"port: cannot listen at {host}:{port}: {error.strerror}"
        ) from error
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=max(1, int(drain_seconds)),
    )
    server = Server(config, state, drain_seconds)
    asyncio.run(server.serve(sockets=[own]))
