"""The answers of /v1/recommend, on the toy model in this process."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from _support.serving import DATA, SHORT, client_of, events, recommend, toy_service

TITLES = DATA.data.catalog.titles


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


def test_a_stream_of_a_state_that_was_kept_has_its_reasoning_too(client):
    body = {"history": ["i2", "i12"], "k": 3, "max_reasoning_tokens": SHORT}
    whole = recommend(client, **body).json()
    found = events(recommend(client, **body, stream=True).text)
    text = "".join(data["text"] for name, data in found if name == "reasoning")
    assert text.strip() == whole["reasoning"] != ""
    direct = events(recommend(client, **body | {"mode": "direct", "stream": True}).text)
    assert [name for name, _ in direct] == ["items", None]


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
