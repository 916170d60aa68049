"""From a checked request to the worker's answer, whole or as a stream, and back if nobody waits."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HTTPRequest
from starlette.responses import StreamingResponse

from r2ec_fast.serve import service as core
from r2ec_fast.serve.http.metrics import Metrics
from r2ec_fast.serve.http.problems import of_exception
from r2ec_fast.serve.http.schemas import RecommendResponse, response
from r2ec_fast.serve.jobs import Answer, Job

POLL = 0.25  # seconds between looks whether the client is still there
DONE = b"data: [DONE]\n\n"

Event = tuple[str | None, dict[str, Any]]  # name and data


class StreamForm:
    """An answer as events: ``reasoning`` with pieces of text, then ``items`` with the whole answer,
    or ``error`` with a problem document."""

    def text(self, piece: str) -> Event:
        return "reasoning", {"text": piece}

    def end(self, answer: RecommendResponse) -> list[Event]:
        return [("items", answer.model_dump())]

    def error(self, problem: dict[str, Any]) -> Event:
        return "error", problem


class Answering:
    """Answers of one service."""

    def __init__(self, service: core.Service, metrics: Metrics) -> None:
        self.service, self.metrics = service, metrics

    async def whole(self, request: core.Request, http: HTTPRequest) -> RecommendResponse:
        """The answer. A client that leaves takes its request with it."""
        job = await run_in_threadpool(self.service.submit, request)
        answer = await self.waited(job, http)
        self.metrics.first_token.labels(_mode(request)).observe(sum(answer.seconds.values()))
        return self._response(job, answer, request)

    async def waited(self, job: Job, http: HTTPRequest) -> Answer:
        """The answer of a job; it is cancelled where the client leaves."""
        future = asyncio.wrap_future(job.future)
        try:
            while True:
                done, _ = await asyncio.wait([future], timeout=POLL)
                if done:
                    return future.result()
                if await http.is_disconnected():
                    raise asyncio.CancelledError
        finally:
            job.future.cancel()

    async def stream(
        self,
        request: core.Request,
        form: StreamForm,
    ) -> StreamingResponse:
        """Server-sent events, in some form, and ``[DONE]``."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def tell(piece: str | None) -> None:  # in the worker's thread
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        # refusals come before the stream begins, with their own status
        job = await run_in_threadpool(self.service.submit, request, tell)
        job.future.add_done_callback(lambda _: tell(None))

        async def events() -> AsyncIterator[bytes]:
            first = True
            try:
                while (piece := await pieces.get()) is not None:
                    if first:
                        seconds = time.monotonic() - job.marks["arrived"]
                        self.metrics.first_token.labels(_mode(request)).observe(seconds)
                        first = False
                    yield event(*form.text(piece))
                error = job.future.exception()
                if error is not None:
                    yield event(*form.error(json.loads(bytes(of_exception(error).body))))
                else:
                    answer = self._response(job, job.future.result(), request)
                    if first and answer.reasoning:  # of a state that was kept
                        yield event(*form.text(answer.reasoning))
                    for one in form.end(answer):
                        yield event(*one)
                yield DONE
            finally:
                job.future.cancel()

        return StreamingResponse(
            events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    def _response(self, job: Job, answer: Answer, request: core.Request) -> RecommendResponse:
        self.metrics.seconds.labels(_mode(request)).observe(sum(answer.seconds.values()))
        return response(
            answer,
            id_=f"rec-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self.service.name,
            prompt_tokens=len(job.prompt),
        )


def event(name: str | None, data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def _mode(request: core.Request) -> str:
    return "reasoned" if request.reasoned else "direct"
