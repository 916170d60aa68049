"""Many clients at once, while the items change."""

from __future__ import annotations

import threading

from _support.serving import DATA, client_of, recommend, toy_service

TITLES = DATA.data.catalog.titles


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
