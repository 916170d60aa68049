"""A toy data set and a toy recommender, small enough for float64."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from _support.backbones import toy_backbone
from _support.tiny_tokenizer import tiny_tokenizer

from r2ec_fast.data import (
    Catalog,
    Examples,
    IdMap,
    InteractionData,
    LoadReport,
    Reasonings,
    RecDataset,
)
from r2ec_fast.model.r2ec import R2ecModel
from r2ec_fast.prompts.builder import PromptConfig

COLOURS = ("red", "blue", "green", "white")
THINGS = ("kettle", "mug", "bowl", "lamp")
SHORT = PromptConfig(
    category="goods",
    category_singular="good",
    window=3,
    user_template="Next {category_singular} in {emb_token}:",
    item_template="{category_singular}:",
)


def toy_dataset(users: int = 12, events: int = 5, seed: int = 0) -> RecDataset:
    """`users` histories over 16 items; the last event of each is for the test, the one before
    for the validation."""
    rng = np.random.default_rng(seed)
    titles = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
    catalog = Catalog(IdMap([f"i{i}" for i in range(16)]), pl.DataFrame({"title": titles}))
    item = np.concatenate([rng.permutation(16)[:events] for _ in range(users)]).astype(np.int64)
    data = InteractionData(
        users=IdMap([f"u{u}" for u in range(users)]),
        catalog=catalog,
        offsets=np.arange(users + 1, dtype=np.int64) * events,
        item=item,
        timestamp=np.tile(np.arange(events, dtype=np.int64) * 86_400, users),
        rating=rng.integers(1, 6, users * events).astype(np.float32),
        report=LoadReport(),
    )
    every = np.arange(users, dtype=np.int64)
    position = np.tile(np.arange(1, events - 2, dtype=np.int64), users)
    return RecDataset(
        data,
        train=Examples(np.repeat(every, events - 3), position),
        valid=Examples(every, np.full(users, events - 2)),
        test=Examples(every, np.full(users, events - 1)),
    )


def toy_reasonings(data: RecDataset, texts_per_example: int = 2) -> Reasonings:
    """Texts of different length for each training example; that of the second kind is followed by
    the first item that the user bought, not by the target."""
    examples, texts, items = [], [], []
    titles = data.data.catalog.titles
    for kind in range(texts_per_example):
        for i, target in enumerate(data.target(data.train).tolist()):
            first = int(data.history(int(data.train.user[i]), 1).items[0])
            examples.append(i)
            items.append(first if kind else target)
            texts.append(titles[target] if kind else f"After a {titles[first]}: {i}")
    return Reasonings.of(data, data.train[np.array(examples)], texts, items)


def toy_model(
    kind: str = "llama",
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    scale: float = 3.0,
    **settings: object,
) -> R2ecModel:
    """A random toy model; ``settings`` are those of ``backbones.toy_config``."""
    backbone = toy_backbone(kind, dtype=dtype, seed=seed, scale=scale, **settings)
    return R2ecModel(backbone, tiny_tokenizer(), temperature=0.1, prompts=SHORT)
