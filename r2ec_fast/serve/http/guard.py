"""What stands before the application: keys, the size of bodies, and the count of requests."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from r2ec_fast.serve.http.problems import problem

MAX_BODY = 16 << 20  # bytes


class State:
    """Whether requests are taken, and how many are under way."""

    def __init__(self) -> None:
        self.draining = False
        self.under_way = 0


class TooLarge(HTTPException):
    """A body beyond the limit, found while it is read."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, _too_large(limit), {"Connection": "close"})


def read_keys(path: str | Path) -> list[str]:
    """The keys of a file, one a line; ValueError where it has none."""
    keys = [line.strip() for line in Path(path).read_text().splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise ValueError(f"api_key_file: {path} holds no key (one a line)")
    return keys


class Guard:
    """ASGI middleware.

    Args:
        app: what it stands before.
        keys: one of them must come as a bearer token to paths under ``/v1``; none: no key is asked.
        max_body: bytes.
        state: requests under ``/v1`` are refused while it drains.
        done: told of each request that was answered: path, method, status, seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str] = (),
        max_body: int = MAX_BODY,
        state: State | None = None,
        done: Callable[[str, str, int, float], None] = lambda *_: None,
    ) -> None:
        self.app, self.max_body, self.done = app, max_body, done
        self.state = state or State()
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status, size = time.monotonic(), 0, 0

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def limited_receive() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body:
                raise TooLarge(self.max_body)
            return message

        headers = dict(scope["headers"])
        guarded = scope["path"].startswith("/v1")
        self.state.under_way += guarded
        try:
            if guarded and self.state.draining:
                answer = problem(503, "the server is shutting down", headers={"Retry-After": "5"})
                await answer(scope, receive, counting_send)
            elif guarded and self._digests and not self._knows(headers):
                answer = problem(
                    401,
                    "expected one of the server's keys: Authorization: Bearer KEY",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await answer(scope, receive, counting_send)
            elif _length(headers) > self.max_body:
                headers_out = {"Connection": "close"}
                answer = problem(413, _too_large(self.max_body), headers=headers_out)
                await answer(scope, receive, counting_send)
            else:
                await self.app(scope, limited_receive, counting_send)
        finally:
            self.state.under_way -= guarded
            # as the routes name it, so that an id in a path makes no series of its own
            route = scope.get("route")
            path = getattr(route, "path", None) or "other"
            self.done(path, scope["method"], status or 499, time.monotonic() - begun)

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a key is among the known; takes as long for any key."""
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = _digest(key.strip())
        found = False
        for digest in self._digests:  # all of them, whichever it is
            found |= hmac.compare_digest(given, digest)
        return found and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _too_large(limit: int) -> str:
    return f"the body has more than {limit} bytes"


def _length(headers: dict[bytes, bytes]) -> int:
    given = headers.get(b"content-length", b"0")
    return int(given) if given.isdigit() else 0
