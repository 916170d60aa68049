"""Slow, plain versions of what r2ec_fast.data does: the oracles of its tests."""

from __future__ import annotations


def plain_time_split(times_by_user: list[list[int]]) -> list[list[tuple[int, int]]]:
    """(user, position) pairs of train, valid, test: all examples by time, cut at 80 and 90%."""
    examples = []
    for user, times in enumerate(times_by_user):
        for position in range(1, len(times)):
            examples.append((times[position], user, position))
    examples.sort()
    total = len(examples)
    bounds = [0, total * 8 // 10, total * 9 // 10, total]
    return [
        [(user, position) for _, user, position in examples[a:b]]
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
