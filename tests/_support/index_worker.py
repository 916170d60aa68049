"""What a spawned process runs with an index that was sent to it."""


def search_in_a_worker(index, queries, results):
    results.put(index.search(queries, 3).indices.tolist())
