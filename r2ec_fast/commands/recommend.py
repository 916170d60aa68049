"""`r2ec-fast recommend`; its docstring is the help of its settings."""

from __future__ import annotations

from typing import Any

from r2ec_fast.serve.display import show_recommendations


def recommend(
    model: str,
    *,
    data: str | None = None,
    users: list[str] | None = None,
    items: list[str] | None = None,
    k: int = 10,
    reasoning: bool = True,
    include: list[str] | None = None,
    filter: dict[str, Any] | None = None,
    max_completion_length: int = 512,
) -> None:
    """Recommend items to users of a data set, or for a list of items.

    Args:
        model: directory that a training run exported.
        data: prepared data set (directory), needed for `users`.
        users: user ids, e.g. `--users '[u1, u2]'`; all that is known of them is their history.
        items: one history: item ids or titles, oldest first, e.g. `--items '[i1, i7]'`.
        k: items a user.
        reasoning: write a reasoning first.
        include: ids or titles of the only items that may be recommended.
        filter: only items whose columns fit, e.g. `--filter '{genres: [Comedy, Drama]}'` or
            `--filter '{price: {max: 20}}'`.
        max_completion_length: longest reasoning (tokens).
    """
    from r2ec_fast.serve.recommender import Recommender

    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    if not users and not items:
        raise ValueError("users, items: give user ids or a list of items")
    if users and data is None:
        raise ValueError("data: needed to look up users by id")
    histories = [*(users or []), *([items] if items else [])]
    names = [*(f"user {user}" for user in users or []), *(["the items given"] if items else [])]
    recommender = Recommender.from_pretrained(model, data=data)
    results = recommender.recommend(
        histories,
        k,
        reasoning,
        include=include,
        filter=filter,
        max_completion_length=max_completion_length,
    )
    for name, result in zip(names, results, strict=True):
        show_recommendations(name, result)
