"""Errors as problem documents (RFC 9457) that name the field."""

from __future__ import annotations

import errno
import http
import json
import logging
import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from r2ec_fast.data import UnknownIdError
from r2ec_fast.serve.catalog.live import VersionGone
from r2ec_fast.serve.jobs import DeadlineExceeded, EngineUnavailable, QueueFull, ShuttingDown
from r2ec_fast.serve.service import BadRequest

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ProblemResponse(JSONResponse):
    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True).encode()


def problem(
    status: int,
    detail: str,
    *,
    field: str | None = None,
    headers: dict[str, str] | None = None,
    **more: Any,
) -> ProblemResponse:
    """The response of an error."""
    body = {"type": "about:blank", "title": http.HTTPStatus(status).phrase, "status": status}
    body |= {"detail": detail, **({} if field is None else {"field": field}), **more}
    return ProblemResponse(body, status, headers=headers)


def of_exception(error: BaseException) -> ProblemResponse:
    """What a failed request is told."""
    if isinstance(error, BadRequest):
        return problem(error.status, str(error), field=error.field)
    if isinstance(error, UnknownIdError):
        return problem(404, str(error), field="id")
    if isinstance(error, QueueFull):
        after = str(math.ceil(error.retry_after))
        return problem(429, str(error), headers={"Retry-After": after})
    if isinstance(error, ShuttingDown | EngineUnavailable):
        return problem(503, str(error), headers={"Retry-After": "5"})
    if isinstance(error, DeadlineExceeded):
        return problem(504, str(error), field="timeout_s")
    if isinstance(error, VersionGone):
        return problem(409, str(error).removeprefix("version: "), field="version")
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return problem(507, f"the change was not made: {error.strerror}")
    if isinstance(error, OSError):
        return problem(503, f"the change was not made: {error.strerror}")
    log.error("a request failed", exc_info=error)
    return problem(500, "the server could not answer; its log says why")


def add_handlers(app: FastAPI) -> None:
    """Make every error of the application a problem document."""

    async def failed(request: Request, error: Exception) -> ProblemResponse:
        return of_exception(error)

    kinds = (BadRequest, UnknownIdError, QueueFull, ShuttingDown, DeadlineExceeded, VersionGone)
    for kind in (*kinds, EngineUnavailable, OSError, Exception):
        app.add_exception_handler(kind, failed)

    async def invalid(request: Request, error: Exception) -> ProblemResponse:
        assert isinstance(error, RequestValidationError)
        errors = [{"field": _field(e["loc"]), "message": e["msg"]} for e in error.errors()]
        first = errors[0]
        detail = f"{first['field']}: {first['message']}" if first["field"] else first["message"]
        return problem(422, detail, field=first["field"] or None, errors=errors[:20])

    async def refused(request: Request, error: Exception) -> ProblemResponse:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        return problem(error.status_code, str(error.detail), headers=headers)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)


def _field(location: Sequence[int | str]) -> str:
    """A place in a body as a request's author writes it: history[3].item."""
    text = ""
    for part in location[1:] if location and location[0] in ("body", "query", "path") else location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not any(mark in part for mark in "[(") and part not in _UNIONS:
            text += f".{part}" if text else part
    return text


_UNIONS = ("str", "int", "float", "bool", "constrained-str", "constrained-int", "HistoryEvent")


def check_distinct(field: str, ids: Sequence[object]) -> None:
    """Raise BadRequest where an id occurs twice in one change."""
    seen: set[str] = set()
    for place, id_ in enumerate(ids):
        if str(id_) in seen:
            raise BadRequest(f"{field}[{place}]", f"the id {id_!r} occurs twice")
        seen.add(str(id_))
