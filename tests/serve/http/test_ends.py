"""Keys, sizes, queues, deadlines, and how requests and the worker end."""

from __future__ import annotations

import threading
import time

import pytest
from _support.serving import DATA, client_of, events, recommend, toy_service

from r2ec_fast.serve.http.guard import read_keys
from r2ec_fast.serve.worker import WorkerSettings

TITLES = DATA.data.catalog.titles


def test_keys(service, tmp_path):
    (tmp_path / "keys").write_text("# for the shop\nalpha\n\nbeta\n")
    keys = read_keys(tmp_path / "keys")
    with client_of(service, keys=keys) as client:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic alpha"}):
            answer = client.get("/v1/models", headers=header)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        for key in keys:
            header = {"Authorization": f"Bearer {key}"}
            assert client.get("/v1/models", headers=header).status_code == 200
        for path in ("/health/ready", "/metrics", "/v2/health/live", "/"):
            assert client.get(path).status_code == 200
    (tmp_path / "none").write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_keys(tmp_path / "none")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit(service, chunked):
    with client_of(service, max_body=1000) as client:
        body = b'{"history": ["' + b"x" * 2000 + b'"]}'
        content = iter([body[:500], body[500:]]) if chunked else body
        answer = client.post("/v1/recommend", content=content)
        assert answer.status_code == 413 and "1000 bytes" in answer.json()["detail"]
        assert recommend(client, history=["i1"], mode="direct").status_code == 200


class Held:
    """Holds a worker at the beginning of its next turn."""

    def __init__(self, worker, monkeypatch):
        self.go, self.entered = threading.Event(), threading.Event()

        def held():
            self.entered.set()
            assert self.go.wait(30)

        monkeypatch.setattr(worker, "_gather", held)


def test_a_full_queue_is_429_with_a_time_to_come_back(monkeypatch):
    service = toy_service(settings=WorkerSettings(max_queue=2))
    held = Held(service.worker, monkeypatch)
    with client_of(service) as client:
        answers = []

        def ask(n):
            answers.append(recommend(client, history=[f"i{n}"], mode="direct"))

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        assert held.entered.wait(10)
        while service.worker.waiting < 2:
            time.sleep(0.01)
        refused = recommend(client, history=["i5"], mode="direct")
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert "vllm:num_requests_waiting 2.0" in client.get("/metrics").text
        held.go.set()
        for thread in threads:
            thread.join()
        assert [a.status_code for a in answers] == [200, 200]
    service.close()


def test_a_deadline_ends_a_request_in_the_queue_and_under_way(monkeypatch):
    service = toy_service()
    held = Held(service.worker, monkeypatch)
    with client_of(service) as client:
        late = []
        ask = threading.Thread(
            target=lambda: late.append(recommend(client, history=["i1"], timeout_s=0.05))
        )
        ask.start()
        held.entered.wait(10)
        time.sleep(0.1)
        held.go.set()
        ask.join()
        assert late[0].status_code == 504 and late[0].json()["field"] == "timeout_s"
        steps = service.worker._decoder.step

        def slow():
            time.sleep(0.05)
            return steps()

        monkeypatch.setattr(service.worker._decoder, "step", slow)
        under_way = recommend(
            client, history=["i2"], timeout_s=0.3, max_reasoning_tokens=100, stream=True
        )
        found = events(under_way.text)
        assert found[-2][0] == "error" and found[-2][1]["status"] == 504
        until = time.monotonic() + 10  # the client is told first
        while len(service.worker._decoder) and time.monotonic() < until:
            time.sleep(0.01)
        assert len(service.worker._decoder) == 0
    service.close()


def test_a_client_that_leaves_takes_its_reasoning_with_it(monkeypatch):
    service = toy_service()
    step = service.worker._decoder.step
    monkeypatch.setattr(service.worker._decoder, "step", lambda: time.sleep(0.02) or step())
    job = service.submit(_long_request())
    while not len(service.worker._decoder):
        time.sleep(0.005)
    job.future.cancel()
    until = time.monotonic() + 2  # its 190 steps would take twice as long
    while len(service.worker._decoder) and time.monotonic() < until:
        time.sleep(0.005)
    assert len(service.worker._decoder) == 0
    service.close()


def _long_request():
    from r2ec_fast.serve.service import Event, Request

    return Request(history=[Event("i1")], max_reasoning_tokens=190)


def test_closing_answers_what_was_queued():
    from r2ec_fast.serve.jobs import ShuttingDown
    from r2ec_fast.serve.service import Event, Request

    service = toy_service()
    jobs = [
        service.submit(
            Request(history=[Event(f"i{n}")], max_reasoning_tokens=20, reasoned=n % 2 == 0)
        )
        for n in range(12)
    ]
    service.close()
    assert all(len(job.future.result(0).found.ids) == 10 for job in jobs)
    with pytest.raises(ShuttingDown):
        service.submit(Request(history=[Event("i1")]))


def test_a_worker_that_dies_says_so(monkeypatch):
    service = toy_service()

    def broken():
        raise SystemError("planted")

    with client_of(service) as client:
        monkeypatch.setattr(service.worker, "_turn_items", broken)
        answer = recommend(client, history=["i1"], mode="direct")
        assert answer.status_code in (200, 500)
        service.worker._thread.join(10)
        assert client.get("/health/live").status_code == 503
        assert recommend(client, history=["i2"], mode="direct").status_code == 503


def test_a_model_that_fails_is_told_and_the_next_request_is_answered(monkeypatch):
    service = toy_service()
    encode = service.model.encode_rows
    with client_of(service) as client:
        with monkeypatch.context() as patch:
            patch.setattr(service.model, "encode_rows", lambda *a, **k: 1 / 0)
            answer = recommend(client, history=["i1"], mode="direct")
            assert answer.status_code == 500 and "its log says why" in answer.json()["detail"]
        assert service.model.encode_rows == encode
        assert recommend(client, history=["i1"], mode="direct").status_code == 200
    service.close()


def test_documents(client):
    assert "swagger" in client.get("/docs").text
    document = client.get("/openapi.json").json()
    assert {"/v1/recommend", "/v1/items", "/v1/chat/completions", "/health/ready"} <= set(
        document["paths"]
    )
