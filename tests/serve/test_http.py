"""The server's API, on the toy model in this process."""

from __future__ import annotations

import base64
import json
import struct
import threading
import time

import numpy as np
import pytest
import torch
from _support.serving import DATA, client_of, events, toy_service

from r2ec_fast.serve.http.guard import read_keys
from r2ec_fast.serve.recommender import Recommender
from r2ec_fast.serve.worker import WorkerSettings

SHORT = 6  # tokens of a reasoning
TITLES = DATA.data.catalog.titles


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


def recommend(client, **body):
    return client.post("/v1/recommend", json=body)


# ---- recommendations ----------------------------------------------------------------------------


@pytest.mark.parametrize("history", [["i1", "i9"], ["RED mug", "i9"], [{"item": "i1"}, "i9"]])
def test_direct_answers_are_the_recommenders(client, recommender, history):
    answer = recommend(client, history=history, k=5, mode="direct").json()
    (expected,) = recommender.recommend([["i1", "i9"]], k=5, reasoning=False)
    assert [(i["item_id"], i["title"], i["score"], i["rank"]) for i in answer["items"]] == [
        (i.item_id, i.title, i.score, i.rank) for i in expected
    ]
    assert answer["reasoning"] is None and answer["finish_reason"] == "direct"
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["timing"]["total_ms"] == pytest.approx(
        sum(v for k, v in answer["timing"].items() if k != "total_ms")
    )


def test_reasoned_answers_are_the_recommenders(client, recommender):
    answer = recommend(client, user_id="u3", k=4, max_reasoning_tokens=SHORT).json()
    (expected,) = recommender.recommend(["u3"], k=4, max_completion_length=SHORT)
    assert answer["reasoning"] == expected.reasoning
    assert [i["item_id"] for i in answer["items"]] == [i.item_id for i in expected]
    assert [i["score"] for i in answer["items"]] == pytest.approx(
        [i.score for i in expected], abs=1e-4
    )
    assert answer["usage"]["completion_tokens"] == SHORT


def test_ages_and_ratings_reach_the_prompt(client, service, recommender):
    from r2ec_fast.data import History

    body = [
        {"item": "i1", "timestamp": 1_000_000, "rating": 4.5},
        {"item": "i9", "timestamp": 1_086_400},
    ]
    answer = recommend(client, history=body, now=1_172_800, k=16, mode="direct").json()
    history = History(
        items=torch.tensor([1, 9]).numpy(),
        timestamps=torch.tensor([1_000_000, 1_086_400]).numpy(),
        ratings=torch.tensor([4.5, float("nan")]).numpy(),
    )
    (expected,) = recommender.recommend([history], k=16, reasoning=False, now=1_172_800)
    assert [i["score"] for i in answer["items"]] == [i.score for i in expected]


def test_what_may_be_found(client):
    every = recommend(client, history=["i1"], k=16, mode="direct").json()["items"]
    assert {i["item_id"] for i in every} == {f"i{n}" for n in range(16)} - {"i1"}
    log_probs = torch.tensor([i["log_prob"] for i in every], dtype=torch.float64)
    assert log_probs.exp().sum() == pytest.approx(1, abs=1e-4)
    some = recommend(client, history=["i1"], k=16, mode="direct", exclude=["i2", "red LAMP"])
    assert {i["item_id"] for i in every} - {i["item_id"] for i in some.json()["items"]} == {
        "i2",
        "i3",
    }
    lamps = recommend(
        client, history=["i3"], k=9, mode="direct", filter={"title": {"contains": "lamp"}}
    )
    assert {i["item_id"] for i in lamps.json()["items"]} == {"i7", "i11", "i15"}
    listed = recommend(client, history=["i3"], k=9, mode="direct", include=["i7", "i3", "gone"])
    assert [i["item_id"] for i in listed.json()["items"]] == ["i7"]
    assert listed.json()["items"][0]["log_prob"] == pytest.approx(0, abs=1e-6)


def test_a_stream_is_the_reasoning_then_the_items_then_the_end(client):
    body = {"history": ["i4", "i5"], "k": 3, "max_reasoning_tokens": 12}
    whole = recommend(client, **body).json()
    answer = recommend(client, **body, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text)
    assert found[-1] == (None, "[DONE]") and found[-2][0] == "items"
    for name in ("items", "reasoning", "model", "table_version", "usage"):
        assert found[-2][1][name] == whole[name]
    assert found[-2][1]["cached"] is True
    fresh = events(recommend(client, **body | {"history": ["i5", "i4"]}, stream=True).text)
    pieces = [data["text"] for name, data in fresh if name == "reasoning"]
    assert "".join(pieces).strip() == fresh[-2][1]["reasoning"] and pieces


def test_the_end_of_a_reasoning_is_never_shown_with_its_marker(service):
    """Pieces end where a marker may begin; whatever the text, they add up to it."""
    from r2ec_fast.serve.jobs import Job
    from r2ec_fast.serve.reasoning_text import ReasoningText

    marker, shown = service.model.prompts.emb_token, []
    texts = ["a", "a <", "a <b", "a <b <answ", f"a <b {marker}", f"a <b {marker} more"]
    reader = ReasoningText(service.model.tokenizer, marker)
    job = Job(np.zeros(1), 1, None, on_text=shown.append)
    for text in texts:
        reader.of = lambda tokens, text=text: text.split(marker)[0]
        reader.show(job, [])
    reader.show(job, [], whole=True)
    assert "".join(shown).strip() == "a <b" and all(piece for piece in shown)


@pytest.mark.parametrize(
    ("body", "status", "field", "message"),
    [
        ({}, 422, "history", "either a history or a user_id"),
        ({"history": ["i1"], "user_id": "u1"}, 422, "history", "either"),
        ({"history": []}, 422, "history", "at least one item"),
        ({"history": ["i1", "nope"]}, 422, "history[1]", "unknown item 'nope'"),
        ({"history": ["i1"], "k": 0}, 422, "k", "greater than or equal to 1"),
        ({"history": ["i1"], "k": 5000}, 422, "k", "less than or equal to 1000"),
        ({"history": ["i1"], "mode": "fast"}, 422, "mode", "'direct' or 'reasoned'"),
        ({"history": ["i1"], "colour": 1}, 422, "colour", "Extra inputs"),
        ({"history": ["i1"], "filter": {"size": 3}}, 422, "filter", "no column 'size'"),
        ({"history": ["i1"], "exclude": ["nope"]}, 422, "exclude", "unknown item 'nope'"),
        ({"user_id": "u999"}, 404, "user_id", "unknown id 'u999'"),
        ({"history": [{"item": "i1", "timestamp": 5}, "i2"]}, 422, "history", "for every event"),
        (
            {"history": [{"item": "i1", "timestamp": 5}, {"item": "i2", "timestamp": 4}]},
            422,
            "history",
            "oldest event first",
        ),
        ({"history": [{"item": "i1", "timestamp": 5}], "now": 4}, 422, "now", "after the newest"),
        ({"history": ["i1"], "max_reasoning_tokens": 8000}, 422, "max_reasoning_tokens", "do not"),
        ({"history": [{"item": "i1", "rating": "NaN"}]}, 422, "history[0].rating", "finite"),
    ],
)
def test_bad_requests_name_the_field(client, body, status, field, message):
    answer = recommend(client, **body)
    problem = answer.json()
    assert answer.status_code == problem["status"] == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert message in json.dumps(problem, ensure_ascii=False)
    named = [problem["field"], *(e["field"] for e in problem.get("errors", ()))]
    assert field in named, problem


def test_a_body_that_is_no_json(client):
    answer = client.post(
        "/v1/recommend", content=b"{not json", headers={"content-type": "application/json"}
    )
    assert answer.status_code == 422 and answer.json()["title"] == "Unprocessable Entity"
    assert client.post("/nowhere").status_code in (404, 405)


# ---- the state cache ----------------------------------------------------------------------------


def test_a_repeated_request_costs_a_search_only():
    service = toy_service()
    with client_of(service) as client:
        body = {"history": ["i1", "i2"], "max_reasoning_tokens": SHORT, "k": 3}
        first, again = (recommend(client, **body).json() for _ in range(2))
        assert (first["cached"], again["cached"]) == (False, True)
        assert again["items"] == first["items"] and again["reasoning"] == first["reasoning"]
        assert recommend(client, **body | {"mode": "direct"}).json()["cached"] is False
        assert recommend(client, **body | {"max_reasoning_tokens": 3}).json()["cached"] is False
        # the table may change meanwhile: states do not depend on it
        client.put("/v1/items", json={"items": [{"id": "n1", "title": "yellow pot"}]})
        later = recommend(client, **body | {"k": 17}).json()
        assert later["cached"] and later["table_version"] == 1
        assert "n1" in {i["item_id"] for i in later["items"]}
        warmed = client.post(
            "/v1/warm", json={"requests": [body, {"user_id": "u1", "mode": "direct"}]}
        )
        assert warmed.json() == {"computed": 1, "known": 1}
        assert recommend(client, user_id="u1", mode="direct").json()["cached"] is True
        metrics = client.get("/metrics").text
        assert "r2ec_state_cache_hits_total 4.0" in metrics
    service.close()


# ---- items --------------------------------------------------------------------------------------


def test_items_over_their_life(tmp_path):
    service = toy_service(tmp_path / "log")
    with client_of(service) as client:
        put = client.put(
            "/v1/items", json={"items": [{"id": "n1", "title": "green tea", "price": 3.5}]}
        )
        assert put.json() == {"table_version": 1, "items": 17}
        assert client.get("/v1/items/n1").json() == {
            "id": "n1",
            "fields": {"title": "green tea", "price": 3.5},
            "since_version": 1,
            "table_version": 1,
        }
        found = client.get("/v1/items", params={"query": "TEA"}).json()["items"]
        assert [i["id"] for i in found] == ["n1"]
        assert client.delete("/v1/items/n1").json() == {"table_version": 2, "items": 16}
        assert client.get("/v1/items/n1").status_code == 404
        assert (
            client.request("DELETE", "/v1/items", json={"ids": ["i0", "i1"]}).json()["items"] == 14
        )
        back = client.post("/v1/items/rollback", json={"version": 1})
        assert back.json() == {"table_version": 4, "items": 17}
        assert client.get("/v1/items/n1").status_code == 200
        gone = client.post("/v1/items/rollback", json={"version": 77})
        assert gone.status_code == 409 and gone.json()["field"] == "version"
    service.close()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"items": []}, "items"),
        ({"items": [{"id": "a"}]}, "items[0].title"),
        ({"items": [{"id": "a", "title": "  "}]}, "items[0].title"),
        ({"items": [{"id": "a", "title": "x"}, {"id": "a", "title": "y"}]}, "items[1]"),
        ({"items": [{"id": "a", "title": "x", "tags": {"deep": 1}}]}, "items[0].tags"),
    ],
)
def test_bad_items_name_the_field(client, body, field):
    answer = client.put("/v1/items", json=body)
    assert answer.status_code == 422
    fields = [answer.json()["field"], *(e["field"] for e in answer.json().get("errors", ()))]
    assert any(f.startswith(field) for f in fields if f), answer.json()


def test_a_full_disk_is_told_and_changes_nothing(tmp_path, monkeypatch):
    import errno
    import os

    service = toy_service(tmp_path / "log")
    with client_of(service) as client:
        client.put("/v1/items", json={"items": [{"id": "n1", "title": "green tea"}]})

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            answer = client.put("/v1/items", json={"items": [{"id": "n2", "title": "red tea"}]})
        assert answer.status_code == 507 and "No space left" in answer.json()["detail"]
        assert client.get("/v1/items/n2").status_code == 404
        again = client.put("/v1/items", json={"items": [{"id": "n2", "title": "red tea"}]})
        assert again.json() == {"table_version": 2, "items": 18}
    service.close()


# ---- OpenAI's shapes ----------------------------------------------------------------------------


def test_models_and_chat(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["object"] == "model"
    chat = {"model": model["id"], "messages": [{"role": "user", "content": "i1\nred lamp"}]}
    answer = client.post("/v1/chat/completions", json=chat | {"max_tokens": SHORT}).json()
    same = recommend(client, history=["i1", "i3"], max_reasoning_tokens=SHORT).json()
    assert answer["r2ec"]["items"] == same["items"]
    content = answer["choices"][0]["message"]["content"]
    assert content.startswith(same["reasoning"]) and f"1. {same['items'][0]['title']}" in content
    assert answer["usage"] == same["usage"]
    stream = client.post("/v1/chat/completions", json=chat | {"max_tokens": SHORT, "stream": True})
    found = events(stream.text)
    assert found[-1] == (None, "[DONE]") and all(name is None for name, _ in found)
    text = "".join(d["choices"][0]["delta"].get("content", "") for _, d in found[:-1])
    assert text.endswith(f"10. {same['items'][9]['title']}")
    assert found[-2][1]["r2ec"]["items"] == same["items"]
    assert found[-2][1]["choices"][0]["finish_reason"] == "length"


def test_chat_with_a_request_of_ours(client):
    body = {"history": ["i1"], "k": 2, "mode": "direct"}
    answer = client.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "What next?"}], "r2ec": body},
    ).json()
    assert [i["item_id"] for i in answer["r2ec"]["items"]] == [
        i["item_id"] for i in recommend(client, **body).json()["items"]
    ]


def test_embeddings_are_the_states(client, service):
    answer = client.post("/v1/embeddings", json={"input": ["i1\ni2", "red mug"]}).json()
    first, second = (torch.tensor(row["embedding"]) for row in answer["data"])
    builder = service._builder
    from r2ec_fast.data import History

    rows = [
        [*builder.user_ids(History(torch.tensor(items).numpy())), *builder.marker_ids]
        for items in ([1, 2], [1])
    ]
    expected = service.model.encode_rows(rows, prefix=service.worker._prefix)
    torch.testing.assert_close(torch.stack([first, second]), expected)
    packed = client.post(
        "/v1/embeddings", json={"input": "i1\ni2", "encoding_format": "base64"}
    ).json()["data"][0]["embedding"]
    assert struct.unpack(f"<{len(first)}f", base64.b64decode(packed)) == tuple(first.tolist())


# ---- keys, sizes, queues, ends ------------------------------------------------------------------


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


def test_sixty_four_clients_while_items_are_written_removed_and_rolled_back(recommender):
    """Direct answers equal the Recommender's, bit for bit, at the version that each names; what is
    written are items that change nothing else: an answer without them is the Recommender's."""
    users = [[f"i{n % 16}", f"i{(3 * n + 1) % 16}"] for n in range(64)]
    expected = {}
    for n, history in enumerate(users):
        (found,) = recommender.recommend([history], k=16, reasoning=False)
        expected[n] = [(item.item_id, item.score) for item in found]
    service, stop, wrong = toy_service(cache_entries=0), threading.Event(), []
    with client_of(service) as client:

        def write():
            number = 0
            while not stop.is_set():
                number += 1
                body = {"items": [{"id": f"n{number % 5}", "title": f"thing {number}"}]}
                assert client.put("/v1/items", json=body).status_code == 200
                if number % 3 == 0:
                    client.delete(f"/v1/items/n{number % 5}")
                if number % 4 == 0:
                    version = client.get("/v1/items/i1").json()["table_version"]
                    client.post("/v1/items/rollback", json={"version": version - 2})

        def ask(n):
            for _ in range(3):
                answer = recommend(client, history=users[n], k=30, mode="direct").json()
                pairs = [(item["item_id"], item["score"]) for item in answer["items"]]
                if [pair for pair in pairs if pair[0].startswith("i")] != expected[n]:
                    wrong.append((n, answer))

        writer = threading.Thread(target=write)
        clients = [threading.Thread(target=ask, args=(n,)) for n in range(64)]
        for thread in (writer, *clients):
            thread.start()
        for thread in clients:
            thread.join()
        stop.set()
        writer.join()
        assert not wrong and service.catalog.version > 3
    service.close()
