"""Baselines that other libraries train: ALS and BPR of `implicit`, SASRec and eSASRec of RecTools.

They are fitted on the training events alone and rank as the counting baselines do: over the whole
catalog without the user's history, equal scores by popularity, then by the lower internal id. An
item that a library has no vector for (no training event) comes after all items that have one. At
prediction SASRec and ALS see the user's own history up to the example; BPR has a vector of each
user, learnt from the user's training events, and sees nothing later.

Ranks and lists are those of `r2ec_kernels` over the libraries' own vectors, in blocks. With one
thread on a CPU the same seed gives the same numbers.
"""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch

from r2ec_fast.eval.baselines import Baseline
from r2ec_kernels import item_topk, target_stats

if TYPE_CHECKING:
    from r2ec_fast.data import Examples, RecDataset

EXTRA = "pip install 'r2ec-fast[baselines]'"


@dataclass(frozen=True)
class ALSSettings:
    """Settings of `implicit`'s AlternatingLeastSquares, by its names."""

    factors: int = 64
    regularization: float = 1.0
    alpha: float = 10.0
    iterations: int = 15
    seed: int = 42


@dataclass(frozen=True)
class BPRSettings:
    """Settings of `implicit`'s BayesianPersonalizedRanking, by its names."""

    factors: int = 64
    learning_rate: float = 0.05
    regularization: float = 0.01
    iterations: int = 100
    seed: int = 42


class VectorBaseline(Baseline):
    """A method whose score of an item is the product of an example's vector with the item's."""

    libraries: tuple[str, ...]  # the modules that must be there

    def __init__(self, dataset: RecDataset, settings: Any) -> None:
        self.check_installed()
        super().__init__(dataset, asdict(settings))

    @classmethod
    def check_installed(cls) -> None:
        """Raise ImportError where a library is missing; it says what to install."""
        for module in cls.libraries:
            if importlib.util.find_spec(module) is None:
                raise ImportError(f"baseline {cls.name} needs {module}: {EXTRA}")

    def _fit(self, users: np.ndarray, items: np.ndarray, positions: np.ndarray) -> None:
        if len(items) == 0:
            raise ValueError(f"train: {self.name} needs training examples, the data set has none")
        vectors, known = self._train(users, items, positions)
        # the items that have a vector, in the order of popularity: equal scores then rank by row
        self.items = self.order[known[self.order]]
        self.row = np.full(self.num_items, -1, dtype=np.int64)
        self.row[self.items] = np.arange(len(self.items))
        self.table = torch.from_numpy(vectors[self.items].astype(np.float32))

    @abstractmethod
    def _train(
        self, users: np.ndarray, items: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Item vectors [N, d], and which of them mean anything, bool [N]."""

    @abstractmethod
    def queries(self, examples: Examples) -> np.ndarray:
        """The examples' vectors, float32 [X, d]; zeros where nothing is known of the user."""

    def _excluded_rows(
        self, examples: Examples, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values, offsets = self.dataset.exclude(examples, window)
        return torch.from_numpy(self.row[values.numpy()]), offsets  # -1: nothing to exclude

    def _block_ranks(
        self, examples: Examples, window: int | None, include: np.ndarray
    ) -> np.ndarray:
        target = self.dataset.target(examples)
        row = self.row[target]
        ranks = target_stats(
            torch.from_numpy(self.queries(examples)),
            self.table,
            torch.from_numpy(np.maximum(row, 0)),
            exclude=self._excluded_rows(examples, window),
            include=torch.from_numpy(include[self.items]),
        ).rank.numpy()
        values, offsets = (np.asarray(part) for part in self.dataset.exclude(examples, window))
        place = np.where(self.row >= 0, -1, self.place)  # items with a vector come first
        for i in np.flatnonzero(row < 0):
            ahead = include & (place < place[target[i]])
            ahead[values[offsets[i] : offsets[i + 1]]] = False
            ranks[i] = 1 + np.count_nonzero(ahead)
        return ranks

    def _block_lists(
        self, examples: Examples, k: int, window: int | None, include: np.ndarray
    ) -> np.ndarray:
        """Of the items that have a vector."""
        found = item_topk(
            torch.from_numpy(self.queries(examples)),
            self.table,
            k,
            exclude=self._excluded_rows(examples, window),
            include=torch.from_numpy(include[self.items]),
        ).indices.numpy()
        return np.where(found < 0, -1, self.items[found])


class ImplicitBaseline(VectorBaseline):
    """A matrix factorization of `implicit`, fitted on which user has which item."""

    libraries = ("implicit",)

    def _train(
        self, users: np.ndarray, items: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        settings = dict(self.settings)
        # one thread: several would race for the same rows
        self.model = self._kind()(random_state=settings.pop("seed"), num_threads=1, **settings)
        seen = each_pair_once(users, items, (self.dataset.data.num_users, self.num_items))
        self.model.fit(seen, show_progress=False)
        known = np.zeros(self.num_items, dtype=bool)
        known[items] = True
        return self.model.item_factors, known

    @abstractmethod
    def _kind(self) -> Any:
        """The library's class."""


class ALS(ImplicitBaseline):
    """Matrix factorization by alternating least squares (Hu, Koren and Volinsky 2008); the vector
    of an example is solved from the user's history before it."""

    name = "als"

    def __init__(self, dataset: RecDataset, settings: ALSSettings | None = None) -> None:
        super().__init__(dataset, settings or ALSSettings())

    def _kind(self) -> Any:
        from implicit.cpu.als import AlternatingLeastSquares

        return AlternatingLeastSquares

    def queries(self, examples: Examples) -> np.ndarray:
        values, offsets = (np.asarray(part) for part in self.dataset.exclude(examples))
        rows = np.repeat(np.arange(len(examples)), np.diff(offsets))
        history = each_pair_once(rows, values, (len(examples), self.num_items))
        return self.model.recalculate_user(np.arange(len(examples)), history)


class BPR(ImplicitBaseline):
    """Matrix factorization by Bayesian personalized ranking (Rendle et al. 2009). A user without
    training events has no vector: the items' biases alone then rank."""

    name = "bpr"

    def __init__(self, dataset: RecDataset, settings: BPRSettings | None = None) -> None:
        super().__init__(dataset, settings or BPRSettings())

    def _kind(self) -> Any:
        from implicit.cpu.bpr import BayesianPersonalizedRanking

        return BayesianPersonalizedRanking

    def queries(self, examples: Examples) -> np.ndarray:
        return self.model.user_factors[examples.user]


def each_pair_once(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sp.csr_matrix:
    """float32 matrix of ones; `implicit` takes no newer kind of sparse matrix."""
    ones = np.ones(len(rows), dtype=np.float32)
    matrix = sp.coo_matrix((ones, (rows, columns)), shape=shape).tocsr()
    matrix.data[:] = 1.0
    return matrix
