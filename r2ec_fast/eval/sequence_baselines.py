"""SASRec and its kin, trained by RecTools.

RecTools (0.19) has SASRec with several losses, the LiGR layers that make it an eSASRec, and item
networks of ids and of categorical features. It has none of given text vectors, as UniSRec needs;
`sasrec-text` is the nearest to it that RecTools offers: an item is the sum of vectors of its
title's words.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from r2ec_fast.eval.beyond_accuracy import words
from r2ec_fast.eval.trained_baselines import VectorBaseline

if TYPE_CHECKING:
    from r2ec_fast.data import Examples, RecDataset


@dataclass(frozen=True)
class SASRecSettings:
    """Settings of RecTools' SASRecModel, by its names; `n_negatives` counts for losses that sample.
    A user's newest `session_max_len` + 1 training events are trained on."""

    n_factors: int = 64
    n_blocks: int = 2
    n_heads: int = 2
    dropout_rate: float = 0.2
    session_max_len: int = 50
    loss: str = "softmax"
    n_negatives: int = 256
    lr: float = 0.001
    batch_size: int = 128
    epochs: int = 50
    seed: int = 42


@dataclass(frozen=True)
class ESASRecSettings(SASRecSettings):
    """As SASRecSettings, with the loss of eSASRec."""

    loss: str = "sampled_softmax"


class SASRec(VectorBaseline):
    """Self-attentive sequential recommendation (Kang and McAuley 2018), with the full softmax over
    the training items as loss unless set otherwise."""

    name, libraries = "sasrec", ("rectools", "pytorch_lightning")

    def __init__(self, dataset: RecDataset, settings: SASRecSettings | None = None) -> None:
        super().__init__(dataset, settings or SASRecSettings())

    def _train(
        self, users: np.ndarray, items: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        from rectools.models import SASRecModel

        settings = dict(self.settings)
        seed = settings.pop("seed")
        with _quiet(), torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = SASRecModel(**settings, **self._variant())
            self.model.fit(self._rectools_dataset(users, items, positions))
        network = self.model.torch_model.eval()
        ids = np.asarray(self.model.data_preparator.get_known_item_ids(), dtype=np.int64)
        tokens = self.model.data_preparator.get_known_items_sorted_internal_ids()
        self.token = np.zeros(self.num_items, dtype=np.int64)  # 0 is the padding
        self.token[ids] = tokens
        with torch.no_grad():
            self.embeddings = network.item_model.get_all_embeddings()
        vectors = np.zeros((self.num_items, self.embeddings.shape[1]), dtype=np.float32)
        vectors[ids] = self.embeddings[torch.from_numpy(tokens)].cpu().numpy()
        return vectors, self.token > 0

    def _variant(self) -> dict[str, Any]:
        """What distinguishes the model from RecTools' SASRec: arguments of its constructor."""
        from rectools.models.nn.item_net import IdEmbeddingsItemNet

        return {"item_net_block_types": (IdEmbeddingsItemNet,)}

    def _rectools_dataset(self, users: np.ndarray, items: np.ndarray, positions: np.ndarray) -> Any:
        return rectools_dataset(users, items, positions)

    @torch.no_grad()
    def queries(self, examples: Examples) -> np.ndarray:
        values, offsets = (np.asarray(part) for part in self.dataset.exclude(examples))
        longest = self.settings["session_max_len"]
        sessions = np.zeros((len(examples), longest), dtype=np.int64)
        for row in range(len(examples)):  # padded on the left, as in training
            tokens = self.token[values[offsets[row] : offsets[row + 1]]]
            tokens = tokens[tokens > 0][-longest:]
            sessions[row, longest - len(tokens) :] = tokens
        network, device = self.model.torch_model.eval(), self.embeddings.device
        batch = {"x": torch.from_numpy(sessions).to(device)}
        states = network.encode_sessions(batch, self.embeddings)[:, -1].cpu().numpy()
        states[~sessions.any(1)] = 0  # nothing known of the user
        return states


class ESASRec(SASRec):
    """SASRec with LiGR layers and a sampled softmax (eSASRec, Tikhonovich et al. 2025)."""

    name = "esasrec"

    def __init__(self, dataset: RecDataset, settings: ESASRecSettings | None = None) -> None:
        super().__init__(dataset, settings or ESASRecSettings())

    def _variant(self) -> dict[str, Any]:
        from rectools.models.nn.transformers.ligr import LiGRLayers

        return {**super()._variant(), "transformer_layers_type": LiGRLayers}


class SASRecText(SASRec):
    """SASRec without item ids: an item is the sum of the vectors of its title's words, so that an
    item without training events has a vector if the training items use any of its words."""

    name = "sasrec-text"

    def _variant(self) -> dict[str, Any]:
        from rectools.models.nn.item_net import CatFeaturesItemNet

        return {"item_net_block_types": (CatFeaturesItemNet,)}

    def _rectools_dataset(self, users: np.ndarray, items: np.ndarray, positions: np.ndarray) -> Any:
        titles = self.dataset.data.catalog.titles
        used = {int(item): sorted(set(words(titles[item]))) for item in np.unique(items)}
        return rectools_dataset(users, items, positions, used)

    def _train(
        self, users: np.ndarray, items: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        vectors, known = super()._train(users, items, positions)
        [net] = self.model.torch_model.item_model.item_net_blocks
        weight = net.embedding_bag.weight.detach().cpu().numpy()
        features = self.model.data_preparator.train_dataset.item_features.get_cat_features()
        place = {word: i for i, (_, word) in enumerate(features.names)}
        for item in np.flatnonzero(~known):
            title = set(words(self.dataset.data.catalog.titles[item]))
            rows = sorted(place[word] for word in title if word in place)
            if rows:
                vectors[item] = weight[rows].sum(0)
                known[item] = True
        return vectors, known


def rectools_dataset(
    users: np.ndarray,
    items: np.ndarray,
    positions: np.ndarray,
    item_words: dict[int, list[str]] | None = None,
) -> Any:
    """A RecTools dataset of training events, with the words of items as their features."""
    import pandas as pd
    from rectools import Columns
    from rectools.dataset import Dataset

    events = pd.DataFrame(
        {
            Columns.User: users,
            Columns.Item: items,
            Columns.Weight: 1.0,
            Columns.Datetime: pd.to_datetime(positions, unit="s"),  # only the order matters
        }
    )
    if item_words is None:
        return Dataset.construct(events)
    features = [(item, "word", word) for item, own in item_words.items() for word in own]
    table = pd.DataFrame(features, columns=["id", "feature", "value"])
    return Dataset.construct(events, item_features_df=table, cat_item_features=["word"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's notes on devices, progress and data loaders."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
