"""Requests to a vLLM server that end when nobody waits for them any more."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from r2ec_fast.serve.jobs import EngineUnavailable, Job


class VLLMClient:
    """Asks one server.

    Args:
        url: such as "http://localhost:8000".
        timeout: seconds without a word of the server after which it counts as away.
    """

    def __init__(self, url: str, timeout: float = 600.0) -> None:
        parts = urlsplit(url.rstrip("/"))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"engine: expected vllm:http://HOST:PORT, got vllm:{url}")
        self.url, self.timeout = url.rstrip("/"), timeout
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path

    def get(self, path: str) -> Any:
        with self._asked("GET", path) as response:
            return json.loads(response.read())

    def post(
        self, path: str, body: dict[str, Any], job: Job | None = None, id_: str | None = None
    ) -> Any:
        """The answer; None where it is no JSON. ``id_`` becomes a part of the request's id there.

        Raises EngineUnavailable, also where ``job`` is cancelled or over.
        """
        with self._asked("POST", path, body, job, id_) as response:
            data = response.read()
            return json.loads(data) if data[:1] in (b"{", b"[") else None

    def stream(
        self, path: str, body: dict[str, Any], job: Job, id_: str | None = None
    ) -> Iterator[Any]:
        """The data of server-sent events; as `post`."""
        with self._asked("POST", path, body | {"stream": True}, job, id_) as response:
            for line in response:
                if job.expire(time.monotonic()):
                    return
                if line.startswith(b"data: [DONE]"):
                    return
                if line.startswith(b"data:"):
                    data = json.loads(line[5:])
                    if "error" in data:
                        raise EngineUnavailable(_text_of("ended the stream with", data["error"]))
                    yield data

    @contextlib.contextmanager
    def _asked(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        job: Job | None = None,
        id_: str | None = None,
    ) -> Iterator[HTTPResponse]:
        timeout = self.timeout
        if job is not None and job.deadline is not None:
            timeout = min(timeout, max(1e-3, job.deadline - time.monotonic()))
        connection = self._kind(self._host, self._port, timeout=timeout)
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if id_ is not None:
            headers["X-Request-Id"] = id_
        try:
            connection.connect()
            if job is not None:
                _hang_up_with(job, connection.sock)
            connection.request(method, self._path + path, data, headers)
            response = connection.getresponse()
            if response.status != 200:
                text = response.read().decode(errors="replace")
                raise EngineUnavailable(_text_of(f"answered {response.status}:", text))
            yield response
        except EngineUnavailable:
            raise
        except (OSError, HTTPException, ValueError) as error:
            raise EngineUnavailable(_text_of("does not answer:", repr(error))) from error
        finally:
            connection.close()


def _hang_up_with(job: Job, sock: socket.socket) -> None:
    """Close a connection when its job is over, which ends the request at the server too."""

    def hang_up(_: object) -> None:
        with contextlib.suppress(OSError):  # it was closed before
            sock.shutdown(socket.SHUT_RDWR)

    job.future.add_done_callback(hang_up)


def _text_of(what: str, detail: object) -> str:
    return f"the vLLM server that writes reasonings {what} {str(detail)[:500]}"
