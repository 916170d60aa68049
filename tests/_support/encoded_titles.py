"""Vectors of real text: the titles of a data set, encoded without a model and by one.

Like the states of a language model, the rows have a mean in common that is several times longer
than what tells them apart: the cosine of two of them is about SHARED_COSINE.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch

SHARED_COSINE = 0.96
BUCKETS = 1 << 13  # of hashed character n-grams
SHORTEST, LONGEST = 5, 24  # tokens of a title that a model reads


def titles() -> list[str]:
    """The titles of R2EC_TEST_DATA's largest small set, in their order."""
    place = os.environ.get("R2EC_TEST_DATA")
    if not place:
        pytest.skip("R2EC_TEST_DATA is not set (a directory of data sets, docs/guides/data.md)")
    path = Path(place) / "amazon-beauty-5core" / "items.tsv"
    if not path.exists():
        pytest.skip(f"no {path}")
    with path.open(newline="", encoding="utf8") as file:
        return [row["title"] for row in csv.DictReader(file, delimiter="\t")]


def parts_of(texts: list[str], count: int) -> list[str]:
    """``count`` different texts: whole ones, then what is left without their first words."""
    found = dict.fromkeys(texts)
    for cut in range(1, 40):
        for text in texts:
            words = text.split()
            if len(words) > cut + 1:
                found[" ".join(words[cut:])] = None
                found[" ".join(words[:-cut])] = None
        if len(found) >= count:
            return list(found)[:count]
    raise AssertionError(f"only {len(found)} texts of the {count} wanted")


def hashed(texts: list[str], d: int) -> torch.Tensor:
    """float32 [texts, d]: counts of hashed character trigrams, projected, and a shared mean."""
    codes, starts = [], [0]
    for text in texts:
        letters = np.frombuffer(f"  {text.lower()} ".encode(), np.uint8).astype(np.int64)
        trigrams = letters[:-2] * 65_599 + letters[1:-1] * 257 + letters[2:]
        codes.append(trigrams * 2_654_435_761 % (1 << 32) >> 19)
        starts.append(starts[-1] + len(trigrams))
    generator = torch.Generator().manual_seed(d)
    projection = torch.randn(BUCKETS, d, generator=generator)
    bags = torch.from_numpy(np.concatenate(codes)), torch.tensor(starts[:-1])
    vectors = torch.nn.functional.embedding_bag(*bags[:1], projection, bags[1], mode="sum")
    vectors = torch.nn.functional.normalize(vectors)
    vectors -= vectors.mean(0)
    spread = vectors.square().sum(1).mean().sqrt()
    direction = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
    length = spread * (SHARED_COSINE / (1 - SHARED_COSINE)) ** 0.5
    return vectors + length * direction


def model_folder() -> str:
    """R2EC_TEST_MODEL."""
    folder = os.environ.get("R2EC_TEST_MODEL")
    if not folder:
        pytest.skip("R2EC_TEST_MODEL does not name a language model")
    return folder


def model_states(texts: list[str], count: int, device: str) -> torch.Tensor:
    """float32 [count, d]: last states of R2EC_TEST_MODEL, those of the texts' beginnings of
    SHORTEST to LONGEST tokens."""
    from transformers import AutoModel, AutoTokenizer

    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    found: list[torch.Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(texts), 16):
            ids = [tokenizer(text).input_ids[:LONGEST] for text in texts[start : start + 16]]
            batch = torch.zeros(len(ids), LONGEST, dtype=torch.int64)  # behind a text: never seen
            for row, own in zip(batch, ids, strict=True):
                row[: len(own)] = torch.tensor(own)
            states = model(input_ids=batch.to(device)).last_hidden_state
            for row, own in zip(states, ids, strict=True):
                found += row[SHORTEST - 1 : len(own)]
            if len(found) >= count:
                return torch.stack(found[:count]).clone()
    raise AssertionError(f"only {len(found)} states of the {count} wanted")
