"""A service on the toy model, and clients of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _support.toy import toy_dataset, toy_model
from starlette.testclient import TestClient

from r2ec_fast.serve.http.app import create_app
from r2ec_fast.serve.service import Service

DATA = toy_dataset()
SHORT = 6  # tokens of a reasoning


def toy_service(items_log: Path | None = None, **settings: Any) -> Service:
    model = toy_model(dtype=torch.float32).eval()
    return Service(model, DATA.data.catalog, data=DATA, items_log=items_log, **settings)


@contextmanager
def client_of(service: Service, **settings: Any) -> Iterator[TestClient]:
    """A client of the application, in this process."""
    with TestClient(create_app(service, **settings), raise_server_exceptions=False) as client:
        yield client


def events(text: str) -> list[tuple[str | None, Any]]:
    """Server-sent events as (name, data); ``[DONE]`` stays text."""
    found = []
    for block in text.split("\n\n"):
        name, data = None, None
        for line in block.splitlines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data = line.removeprefix("data: ")
        if data is not None:
            found.append((name, data if data == "[DONE]" else json.loads(data)))
    return found


def recommend(client: TestClient, **body: Any) -> Any:
    """The response to a request for recommendations."""
    return client.post("/v1/recommend", json=body)
