"""OpenAI's shapes: models, chat, embeddings."""

from __future__ import annotations

import base64
import struct

import torch
from _support.serving import DATA, SHORT, events, recommend

TITLES = DATA.data.catalog.titles


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
