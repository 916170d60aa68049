"""Splits: every event at position >= 1 of a user's history is one next-item example."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np

from r2ec_fast.data.dataset import RecDataset
from r2ec_fast.data.parse import parse_time
from r2ec_fast.data.types import Examples, InteractionData

METHODS = ("time", "leave_one_out", "time_cut")


def make_splits(
    data: InteractionData,
    method: str = "time",
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    valid_from: int | str | None = None,
    test_from: int | str | None = None,
) -> RecDataset:
    """Split the examples of `data` into train, valid and test.

    Args:
        data: the interactions.
        method: "time": all examples ordered by the target's time, cut at `fractions` (the paper:
            80/10/10); "leave_one_out": a user's last event is test, the one before it valid;
            "time_cut": cut at `valid_from` and `test_from`.
        fractions: shares of train, valid, test for "time"; they add up to 1. Sizes are rounded
            down at each cut, so test gets the remainder.
        valid_from, test_from: first time of valid and of test for "time_cut"; unix seconds or
            ISO text such as "2023-07-01".

    Returns:
        RecDataset. Examples of "time" and "time_cut" are ordered by (target time, user, position),
        those of "leave_one_out" by (user, position).

    Raises:
        ValueError: an unknown method, a time split of data without times, wrong fractions or cuts.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if method != "time_cut" and (valid_from is not None or test_from is not None):
        raise ValueError(f"valid_from, test_from: only for method 'time_cut', got {method!r}")
    settings: dict[str, object] = {"split": method}
    everything = _all_examples(data)
    if method == "leave_one_out":
        train, valid, test = _leave_one_out(data, everything)
    else:
        if data.timestamp is None:
            raise ValueError(
                f"method: {method!r} needs timestamps and this data has none; "
                "use method='leave_one_out'"
            )
        target = data.offsets[everything.user] + everything.position
        times = data.timestamp[target]
        order = np.lexsort((everything.position, everything.user, times))
        ordered, times = everything[order], times[order]
        if method == "time":
            first, second = _fraction_cuts(len(ordered), fractions)
            settings["fractions"] = list(fractions)
        else:
            bounds = _time_bounds(valid_from, test_from)
            first, second = np.searchsorted(times, bounds, side="left").tolist()
            settings["valid_from"], settings["test_from"] = bounds
        train, valid, test = ordered[:first], ordered[first:second], ordered[second:]
    return RecDataset(data, train, valid, test, settings)


def _all_examples(data: InteractionData) -> Examples:
    lengths = np.diff(data.offsets)
    count = np.maximum(lengths - 1, 0)
    user = np.repeat(np.arange(data.num_users), count)
    first = np.cumsum(count) - count
    position = np.arange(len(user)) - np.repeat(first, count) + 1
    return Examples(user, position)


def _leave_one_out(
    data: InteractionData, examples: Examples
) -> tuple[Examples, Examples, Examples]:
    left = np.diff(data.offsets)[examples.user] - examples.position  # 1: last, 2: the one before
    return examples[left > 2], examples[left == 2], examples[left == 1]


def _fraction_cuts(total: int, fractions: tuple[float, float, float]) -> tuple[int, int]:
    # Exact decimals: 0.7 + 0.1 in binary is below 0.8 and would move a cut by one.
    exact = [Fraction(str(f)) for f in fractions]
    if len(exact) != 3 or any(f < 0 for f in exact) or sum(exact) != 1:
        raise ValueError(
            f"fractions: expected three shares >= 0 that add up to 1, got {tuple(fractions)}"
        )
    return floor(total * exact[0]), floor(total * (exact[0] + exact[1]))


def _time_bounds(valid_from: int | str | None, test_from: int | str | None) -> tuple[int, int]:
    if valid_from is None or test_from is None:
        raise ValueError(
            "valid_from, test_from: both are needed for method 'time_cut', "
            f"got {valid_from!r} and {test_from!r}"
        )
    bounds = parse_time(valid_from, "valid_from"), parse_time(test_from, "test_from")
    if bounds[0] > bounds[1]:
        raise ValueError(
            f"valid_from: expected a time not after test_from, got {valid_from!r} > {test_from!r}"
        )
    return bounds


def sample_examples(data: RecDataset, split: str, samples: int, seed: int) -> Examples:
    """A seeded sample of a split in its own order, or all of it (``samples`` 0).

    Raises ValueError for an unknown split.
    """
    if split not in ("train", "valid", "test"):
        raise ValueError(f"split: expected train, valid or test, got {split!r}")
    examples = getattr(data, split)
    if not samples or samples >= len(examples):
        return examples
    drawn = np.random.default_rng([seed, len(examples)]).choice(
        len(examples), samples, replace=False
    )
    return examples[np.sort(drawn)]


def training_events(dataset: RecDataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(user, item, position), int64 [E] each, of every event up to the user's last training target:
    what a model may be fitted on. Ordered by user and position."""
    data, train = dataset.data, dataset.train
    last = np.full(data.num_users, -1, dtype=np.int64)
    np.maximum.at(last, train.user, train.position)
    users = np.repeat(np.arange(data.num_users), np.diff(data.offsets))
    positions = np.arange(data.num_events) - data.offsets[users]
    known = positions <= last[users]
    return users[known], data.item[known], positions[known]


def examples_at(places: np.ndarray, total: int, seed: int) -> np.ndarray:
    """The numbers int64 [n] of the examples at ``places`` of an endless training order.

    The order is a permutation of all ``total`` examples for each epoch, drawn from (seed, epoch): a
    function of the place alone, so that a resumed run needs no state.
    """
    index = np.empty(len(places), np.int64)
    for epoch in np.unique(places // total):
        order = np.random.default_rng([seed, int(epoch)]).permutation(total)
        own = places // total == epoch
        index[own] = order[places[own] % total]
    return index
