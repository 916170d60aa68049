"""The application: routes over a `Service`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Query
from fastapi_offline import FastAPIOffline
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from r2ec_fast.serve.http import openai, problems
from r2ec_fast.serve.http.answering import Answering, StreamForm
from r2ec_fast.serve.http.guard import MAX_BODY, Guard, State
from r2ec_fast.serve.http.metrics import Metrics
from r2ec_fast.serve.http.schemas import (
    DeleteItems,
    FoundItems,
    ItemState,
    Problem,
    PutItems,
    RecommendRequest,
    RecommendResponse,
    Rollback,
    TableState,
    Warm,
    Warmed,
)
from r2ec_fast.serve.service import Service
from r2ec_kernels import __version__

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "content": {problems.MEDIA_TYPE: {}}}
    for status in (400, 401, 404, 409, 413, 422, 429, 503, 504, 507)
}

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; object-src 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # asked for again each time, so that its files fit one another
}


class Page(StaticFiles):
    """The files of the page at ``/``, which load nothing from elsewhere and run no inline code."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(PAGE_HEADERS)
        return response


def create_app(
    service: Service,
    *,
    metrics: Metrics | None = None,
    state: State | None = None,
    keys: Sequence[str] = (),
    max_body: int = MAX_BODY,
    timeout: float | None = None,
) -> FastAPI:
    """The ASGI application.

    Args:
        keys: one of them must come with requests under ``/v1``; none: no key is asked.
        max_body: bytes of a request.
        timeout: seconds of a request that names none; None: no limit.
    """
    metrics, state = metrics or Metrics(), state or State()
    metrics.watch(service)
    app = FastAPIOffline(
        title="r2ec-fast",
        version=__version__,
        description="Recommendations of a large recommender model that reasons.",
        redoc_url=None,
        responses=ERRORS,
    )
    answering = Answering(service, metrics)
    app.include_router(_recommendations(answering, timeout))
    app.include_router(_items(service))
    app.include_router(openai.router(answering))
    app.include_router(_health(service, metrics, state))
    page = files("r2ec_fast.serve.http") / "page"
    app.mount("/", Page(directory=str(page), html=True), name="page")
    problems.add_handlers(app)
    app.add_middleware(Guard, keys=keys, max_body=max_body, state=state, done=metrics.request_done)
    return app


def _recommendations(answering: Answering, timeout: float | None) -> APIRouter:
    routes, service = APIRouter(tags=["recommendations"]), answering.service

    @routes.post("/v1/recommend", response_model=RecommendResponse)
    async def recommend(body: RecommendRequest, http: HTTPRequest) -> RecommendResponse | Response:
        """The best items for a user that the user does not know. With ``stream``, server-sent
        events: ``reasoning`` with pieces of text, then ``items`` with the whole answer, then
        ``[DONE]``."""
        request = body.request(timeout)
        if not body.stream:
            return await answering.whole(request, http)
        return await answering.stream(request, StreamForm())

    @routes.post("/v1/warm")
    async def warm(body: Warm, http: HTTPRequest) -> Warmed:
        """Compute the states of requests to come, so that each then costs one search."""
        jobs = [
            await run_in_threadpool(service.submit_state, one.request(timeout))
            for one in body.requests
        ]
        answers = await asyncio.gather(*(answering.waited(job, http) for job in jobs))
        known = sum(answer.cached for answer in answers)
        return Warmed(computed=len(answers) - known, known=known)

    return routes


def _items(service: Service) -> APIRouter:
    routes, catalog = APIRouter(tags=["items"]), service.catalog

    def changed(version: int) -> TableState:
        return TableState(table_version=version, items=len(catalog))

    @routes.get("/v1/items")
    async def search(
        query: str = Query("", max_length=200), limit: int = Query(20, ge=1, le=200)
    ) -> FoundItems:
        """Items whose title holds the query."""
        found = await run_in_threadpool(catalog.items.search, query, limit)
        return FoundItems(items=[ItemState.of(item, catalog.version) for item in found])

    @routes.put("/v1/items")
    async def put(body: PutItems) -> TableState:
        """Add items, or change those whose ids are known. Answered when the change is on the disk
        and seen by searches, all of it at once."""
        items = [(item.id, item.fields()) for item in body.items]
        problems.check_distinct("items", [id_ for id_, _ in items])
        return changed(await run_in_threadpool(service.put_items, items))

    @routes.delete("/v1/items")
    async def delete_many(body: DeleteItems) -> TableState:
        """Remove items."""
        problems.check_distinct("ids", body.ids)
        return changed(await run_in_threadpool(catalog.delete, body.ids))

    @routes.post("/v1/items/rollback")
    async def rollback(body: Rollback) -> TableState:
        """Make the items again what they were at an earlier version, as a new version."""
        return changed(await run_in_threadpool(catalog.rollback, body.version))

    @routes.get("/v1/items/{item_id}")
    async def get(item_id: str) -> ItemState:
        """An item as it is now."""
        item = await run_in_threadpool(catalog.items.get, item_id)
        return ItemState.of(item, catalog.version)

    @routes.delete("/v1/items/{item_id}")
    async def delete(item_id: str) -> TableState:
        """Remove an item."""
        return changed(await run_in_threadpool(catalog.delete, [item_id]))

    return routes


def _health(service: Service, metrics: Metrics, state: State) -> APIRouter:
    routes = APIRouter(tags=["health"])

    @routes.get("/health/live")
    @routes.get("/v2/health/live")
    async def live() -> JSONResponse:
        """Whether the process does its work; 503 where it should be started again."""
        alive = service.worker.alive
        return JSONResponse({"live": alive}, 200 if alive else 503)

    @routes.get("/health/ready")
    @routes.get("/v2/health/ready")
    @routes.get("/health")
    async def ready() -> JSONResponse:
        """Whether requests should be sent here; 503 while the server shuts down."""
        fine = service.worker.alive and not state.draining
        return JSONResponse({"ready": fine}, 200 if fine else 503)

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return routes
