"""Data sets of plain histories: a list of item ids for each user."""

from __future__ import annotations

import numpy as np
import polars as pl

from r2ec_fast.data import Catalog, Examples, IdMap, InteractionData, RecDataset


def examples(pairs) -> Examples:
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return Examples(user=table[:, 0], position=table[:, 1])


def dataset(histories, num_items, train, test) -> RecDataset:
    fields = pl.DataFrame({"title": [f"item {i}" for i in range(num_items)]})
    data = InteractionData(
        users=IdMap(range(len(histories))),
        catalog=Catalog(ids=IdMap(range(num_items)), fields=fields),
        offsets=np.cumsum([0] + [len(h) for h in histories]),
        item=np.concatenate(histories).astype(np.int64),
        timestamp=None,
        rating=None,
        report=None,
    )
    return RecDataset(data, examples(train), examples([]), examples(test), settings={})


def random_dataset(seed, num_users=40, num_items=30, longest=12) -> RecDataset:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, longest, num_users)
    # squared: few popular items, so that counts differ, and many ties among the rest
    histories = [(generator.random(n) ** 2 * num_items).astype(int) for n in lengths]
    train = [(u, p) for u, h in enumerate(histories) for p in range(1, len(h) - 1)]
    test = [(u, len(h) - 1) for u, h in enumerate(histories)]
    return dataset(histories, num_items, train, test)


def training_sequences(data: RecDataset) -> dict[int, list[int]]:
    last = {}
    for user, position in zip(data.train.user, data.train.position, strict=True):
        last[user] = max(last.get(user, -1), position)
    start = data.data.offsets
    return {u: data.data.item[start[u] : start[u] + p + 1].tolist() for u, p in last.items()}
