"""The toy model's service, a client of it, and the same model as a Recommender."""

from __future__ import annotations

import pytest
import torch
from _support.serving import DATA, client_of, toy_service

from r2ec_fast.serve.recommender import Recommender


@pytest.fixture(scope="module")
def service():
    service = toy_service()
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(service):
    with client_of(service) as client:
        yield client


@pytest.fixture(scope="module")
def recommender():
    from _support.toy import toy_model

    return Recommender(toy_model(dtype=torch.float32).eval(), DATA.data.catalog, data=DATA)
