"""Items over HTTP: their life, mistakes, and a full disk."""

from __future__ import annotations

import pytest
from _support.serving import DATA, client_of, toy_service

TITLES = DATA.data.catalog.titles


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
