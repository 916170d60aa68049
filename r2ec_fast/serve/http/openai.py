"""OpenAI's shapes: a history is the last user message (or the input), an item a line.

What these shapes have no place for stands in the field ``r2ec``: a whole request as
``/v1/recommend`` takes it; answers carry the recommendations in the same field.
"""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from r2ec_fast.serve.http.answering import Answering, Event, StreamForm
from r2ec_fast.serve.http.schemas import RecommendRequest, RecommendResponse, Text
from r2ec_fast.serve.service import BadRequest

MAX_INPUTS = 256


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str = Field(max_length=1 << 20)


class ChatRequest(BaseModel):
    """A chat; fields of OpenAI's that mean nothing here are ignored."""

    model_config = ConfigDict(extra="ignore")
    model: str | None = None
    messages: list[Message] = Field(min_length=1, max_length=1_000)
    max_tokens: int | None = Field(None, ge=1, le=8_192)
    max_completion_tokens: int | None = Field(None, ge=1, le=8_192)
    stream: bool = False
    r2ec: RecommendRequest | None = None


class EmbeddingsRequest(BaseModel):
    """Histories whose states are wanted."""

    model_config = ConfigDict(extra="ignore")
    model: str | None = None
    input: Text | list[Text] = Field(description="A history, an item a line; or several.")
    encoding_format: Literal["float", "base64"] = "float"
    mode: Literal["direct", "reasoned"] = "direct"


def router(answering: Answering) -> APIRouter:
    """The routes of OpenAI's API."""
    routes, service = APIRouter(tags=["OpenAI"]), answering.service

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served."""
        own = {"id": service.name, "object": "model", "created": int(service.started)}
        return {"object": "list", "data": [own | {"owned_by": "r2ec-fast"}]}

    @routes.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, http: HTTPRequest) -> dict[str, Any] | Response:
        """Recommendations as a chat completion: the reasoning and the titles as the message's
        content, the items in the field ``r2ec``."""
        request = _of_chat(body)
        if body.stream:
            return await answering.stream(request.request(), _Chunks(service.name))
        answer = await answering.whole(request.request(), http)
        message = {"role": "assistant", "content": _content(answer)}
        choice = {"index": 0, "message": message, "finish_reason": _reason(answer)}
        return {
            "id": f"chatcmpl-{answer.id}",
            "object": "chat.completion",
            "created": answer.created,
            "model": answer.model,
            "choices": [choice | {"logprobs": None}],
            "usage": answer.usage.model_dump(),
            "r2ec": answer.model_dump(),
        }

    @routes.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsRequest, http: HTTPRequest) -> dict[str, Any]:
        """User states, which the item table is searched with."""
        given = [body.input] if isinstance(body.input, str) else body.input
        if not 1 <= len(given) <= MAX_INPUTS:
            raise BadRequest("input", f"expected 1 to {MAX_INPUTS} histories, got {len(given)}")
        jobs = []
        for place, text in enumerate(given):
            request = RecommendRequest(history=_lines("input", text), mode=body.mode)
            try:
                jobs.append(await run_in_threadpool(service.submit_state, request.request()))
            except BadRequest as error:
                raise BadRequest(f"input[{place}]", str(error), status=error.status) from error
        answers = await asyncio.gather(*(answering.waited(job, http) for job in jobs))
        data = []
        for place, answer in enumerate(answers):
            state = answer.user.state.float().cpu().numpy()
            encoded: Any = state.tolist()
            if body.encoding_format == "base64":
                encoded = base64.b64encode(state.astype("<f4").tobytes()).decode()
            data.append({"object": "embedding", "index": place, "embedding": encoded})
        tokens = sum(len(job.prompt) for job in jobs)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": service.name, "usage": usage}

    return routes


class _Chunks(StreamForm):
    """An answer as chunks of a chat completion."""

    def __init__(self, model: str) -> None:
        self._chunk = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }

    def text(self, piece: str) -> Event:
        return None, self._of({"content": piece}, None)

    def error(self, problem: dict[str, Any]) -> Event:
        text, kind = problem["detail"], problem["title"]
        return None, {"error": {"message": text, "type": kind, "code": problem["status"]}}

    def end(self, answer: RecommendResponse) -> list[Event]:
        titles = _titles(answer)
        text = f"\n\n{titles}" if answer.reasoning else titles
        last = self._of({}, _reason(answer)) | {"r2ec": answer.model_dump()}
        last["usage"] = answer.usage.model_dump()
        return [(None, self._of({"content": text}, None)), (None, last)]

    def _of(self, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": {"role": "assistant"} | delta, "finish_reason": reason}
        return self._chunk | {"choices": [choice]}


def _of_chat(body: ChatRequest) -> RecommendRequest:
    limit = body.max_completion_tokens or body.max_tokens
    changes: dict[str, Any] = {} if limit is None else {"max_reasoning_tokens": limit}
    if body.r2ec is not None:
        return body.r2ec.model_copy(update=changes)
    last = next((m for m in reversed(body.messages) if m.role == "user"), None)
    if last is None:
        raise BadRequest("messages", "expected a message of the user, an item's id or title a line")
    return RecommendRequest(history=_lines("messages", last.content), **changes)


def _lines(field: str, text: str) -> list[Any]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise BadRequest(field, "expected an item's id or title a line, got none")
    if max(map(len, lines)) > 2_000:
        raise BadRequest(field, "expected lines of at most 2000 characters, an item each")
    return lines


def _content(answer: RecommendResponse) -> str:
    titles = _titles(answer)
    return f"{answer.reasoning}\n\n{titles}" if answer.reasoning else titles


def _titles(answer: RecommendResponse) -> str:
    return "\n".join(f"{item.rank}. {item.title}" for item in answer.items)


def _reason(answer: RecommendResponse) -> str:
    return "length" if answer.finish_reason == "length" else "stop"
