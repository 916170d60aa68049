"""Data sets of the quick start's generated world, for tests of what takes any data set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from r2ec_fast.data import RecDataset
from r2ec_fast.quickstart.world import World


def generated_dataset(users: int) -> RecDataset:
    """Users with times and ratings, some of which are missing."""
    dataset = World(users=users).dataset()
    rng = np.random.default_rng(0)
    ratings = rng.integers(1, 6, dataset.data.num_events).astype(np.float32)
    ratings[rng.random(len(ratings)) < 0.2] = np.nan
    return replace(dataset, data=replace(dataset.data, rating=ratings))
