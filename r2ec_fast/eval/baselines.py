"""Counting baselines: popularity, first-order Markov counts, item k-nearest-neighbours.

They are fitted on the training events alone (the targets of the training examples and the events
before them). At prediction they see, like the recommender, the user's own history up to the
example. Ranking is over the whole catalog without the user's history; the target is never excluded.
Equal scores are ordered by popularity, then by the lower internal id. Scores are sparse: no
[examples, items] matrix is formed.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from r2ec_fast.data.splits import training_events

if TYPE_CHECKING:
    from r2ec_fast.data import Examples, RecDataset

EXAMPLES_PER_BLOCK = 1024
ITEMS_PER_BLOCK = 1024


class Baseline(ABC):
    """A method fitted on the training events of `dataset`.

    Attributes:
        settings: its hyper-parameters; plain JSON values.
        fit_seconds, fit_cpu_seconds: how long fitting took, and the processor time of it.
        order, place: [N] the items in the order of popularity (equal: lower id first), and where in
            it an item stands: the tie-break of all baselines.
    """

    name: str

    def __init__(self, dataset: RecDataset, settings: dict[str, Any] | None = None) -> None:
        self.dataset = dataset
        self.settings = settings or {}
        users, items, positions = training_events(dataset)
        self.num_items = len(dataset.data.catalog)
        counts = np.bincount(items, minlength=self.num_items)
        self.order = np.lexsort((np.arange(self.num_items), -counts))
        self.place = np.empty(self.num_items, dtype=np.int64)
        self.place[self.order] = np.arange(self.num_items)
        start, start_cpu = time.perf_counter(), time.process_time()
        self._fit(users, items, positions)
        self.fit_seconds = time.perf_counter() - start
        self.fit_cpu_seconds = time.process_time() - start_cpu

    @abstractmethod
    def _fit(self, users: np.ndarray, items: np.ndarray, positions: np.ndarray) -> None:
        """Learn from training events [E], ordered by (user, position)."""

    @abstractmethod
    def _block_ranks(
        self, examples: Examples, window: int | None, include: np.ndarray
    ) -> np.ndarray:
        """`ranks` of a block of examples."""

    @abstractmethod
    def _block_lists(
        self, examples: Examples, k: int, window: int | None, include: np.ndarray
    ) -> np.ndarray:
        """`top_items` of a block of examples."""

    def ranks(
        self,
        examples: Examples,
        *,
        window: int | None = None,
        include: np.ndarray | None = None,
    ) -> np.ndarray:
        """Rank (from 1) of each example's target, int64 [X].

        Args:
            examples: what to predict.
            window: None excludes all earlier events of the user, a number only the newest `window`
                ones.
            include: bool [N], the only items that compete with a target; None: all.
        """
        allowed = self._allowed(include)
        blocks = [self._block_ranks(part, window, allowed) for part in _blocks(examples)]
        return np.concatenate(blocks) if blocks else np.empty(0, dtype=np.int64)

    def top_items(
        self,
        examples: Examples,
        k: int,
        *,
        window: int | None = None,
        include: np.ndarray | None = None,
    ) -> np.ndarray:
        """The k best items of each example, int64 [X, k], best first; -1 where fewer are left.

        Unlike in `ranks`, a target that the user had before, or that is not included, is left out
        as any other item is.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        allowed = self._allowed(include)
        blocks = [self._block_lists(part, k, window, allowed) for part in _blocks(examples)]
        return np.concatenate(blocks) if blocks else np.empty((0, k), dtype=np.int64)

    def _allowed(self, include: np.ndarray | None) -> np.ndarray:
        if include is None:
            return np.ones(self.num_items, dtype=bool)
        if include.dtype != bool or include.shape != (self.num_items,):
            raise ValueError(
                f"include: expected a bool mask of shape [{self.num_items}], got "
                f"{include.dtype} {list(include.shape)}"
            )
        return include


class CountingBaseline(Baseline):
    """A baseline whose scores are non-negative and zero where nothing is known."""

    @abstractmethod
    def scores(self, examples: Examples) -> sp.csr_array:
        """Scores [X, N] float64, sparse: an entry that is not stored is 0."""

    def _block_ranks(
        self, examples: Examples, window: int | None, include: np.ndarray
    ) -> np.ndarray:
        targets = self.dataset.target(examples)
        excluded = _keys(*self.dataset.exclude(examples, window), self.num_items)
        own = np.arange(len(examples)) * self.num_items + targets
        excluded = np.setdiff1d(excluded, own)
        scores = self.scores(examples).tocsr()
        return _ranks_from_sparse(scores, targets, excluded, self.place, include)

    def _block_lists(
        self, examples: Examples, k: int, window: int | None, include: np.ndarray
    ) -> np.ndarray:
        scores = self.scores(examples).tocsr()
        seen, offsets = (np.asarray(part) for part in self.dataset.exclude(examples, window))
        lists = np.full((len(examples), k), -1, dtype=np.int64)
        value = np.zeros(self.num_items)
        order = self.order[include[self.order]]
        for row in range(len(examples)):
            stored = slice(scores.indptr[row], scores.indptr[row + 1])
            scored, excluded = scores.indices[stored], seen[offsets[row] : offsets[row + 1]]
            value[scored] = scores.data[stored]
            competing = scored[include[scored]]
            # the most popular items: enough of them though all the others stand among them
            popular = order[: k + len(scored) + len(excluded)]
            allowed = np.setdiff1d(np.union1d(competing, popular), excluded)
            best = allowed[np.lexsort((self.place[allowed], -value[allowed]))][:k]
            lists[row, : len(best)] = best
            value[scored] = 0
        return lists


class Popularity(CountingBaseline):
    """Number of training events of the item."""

    name = "popularity"

    def _fit(self, users: np.ndarray, items: np.ndarray, positions: np.ndarray) -> None:
        pass  # the popularity order, which every baseline has, is all of it

    def scores(self, examples: Examples) -> sp.csr_array:
        return sp.csr_array((len(examples), self.num_items), dtype=np.float64)


class Markov(CountingBaseline):
    """How often the item directly followed the user's last item in the training events."""

    name = "markov-1"

    def _fit(self, users: np.ndarray, items: np.ndarray, positions: np.ndarray) -> None:
        follows = (users[1:] == users[:-1]) & (positions[1:] == positions[:-1] + 1)
        pairs = (items[:-1][follows], items[1:][follows])
        shape = (self.num_items, self.num_items)
        self.transitions = sp.coo_array((np.ones(len(pairs[0])), pairs), shape=shape).tocsr()

    def scores(self, examples: Examples) -> sp.csr_array:
        data = self.dataset.data
        last = data.item[data.offsets[examples.user] + examples.position - 1]
        return self.transitions[last]


class ItemKNN(CountingBaseline):
    """Sum, over the user's past items, of the cosine similarity of the two items' sets of training
    users.

    Args:
        dataset: training events and catalog.
        neighbours: similarities kept per item, largest first (equal: lower id first).
    """

    name = "item-knn"

    def __init__(self, dataset: RecDataset, neighbours: int = 100) -> None:
        if neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {neighbours}")
        self.neighbours = neighbours
        super().__init__(dataset, {"neighbours": neighbours})

    def _fit(self, users: np.ndarray, items: np.ndarray, positions: np.ndarray) -> None:
        shape = (self.dataset.data.num_users, self.num_items)
        seen = sp.coo_array((np.ones(len(users)), (users, items)), shape=shape).tocsr()
        seen.data[:] = 1.0
        norms = np.sqrt(seen.sum(axis=0))
        by_item = seen.T.tocsr()
        blocks = []
        for start in range(0, self.num_items, ITEMS_PER_BLOCK):
            stop = min(start + ITEMS_PER_BLOCK, self.num_items)
            together = (by_item[start:stop] @ seen).tocoo()
            rows, columns = together.coords
            other = rows + start != columns
            rows, columns = rows[other], columns[other]
            cosine = together.data[other] / (norms[rows + start] * norms[columns])
            blocks.append(self._nearest(rows, columns, cosine, stop - start))
        self.similarity = sp.vstack(blocks, format="csr")

    def _nearest(
        self, rows: np.ndarray, columns: np.ndarray, cosine: np.ndarray, num_rows: int
    ) -> sp.csr_array:
        order = np.lexsort((columns, -cosine, rows))
        rows, columns, cosine = rows[order], columns[order], cosine[order]
        first = np.searchsorted(rows, np.arange(num_rows))
        near = np.arange(len(rows)) - first[rows] < self.neighbours
        entries = (cosine[near], (rows[near], columns[near]))
        return sp.coo_array(entries, shape=(num_rows, self.num_items)).tocsr()

    def scores(self, examples: Examples) -> sp.csr_array:
        keys = _keys(*self.dataset.exclude(examples), self.num_items)
        entries = (np.ones(len(keys)), np.divmod(keys, self.num_items))
        history = sp.coo_array(entries, shape=(len(examples), self.num_items)).tocsr()
        return history @ self.similarity


COUNTING: dict[str, type[CountingBaseline]] = {
    kind.name: kind for kind in (Popularity, Markov, ItemKNN)
}


def counting_baselines(dataset: RecDataset) -> list[CountingBaseline]:
    """Popularity, Markov-1 and ItemKNN, fitted on the training events of `dataset`."""
    return [kind(dataset) for kind in COUNTING.values()]


def _blocks(examples: Examples) -> list[Examples]:
    starts = range(0, len(examples), EXAMPLES_PER_BLOCK)
    return [examples[start : start + EXAMPLES_PER_BLOCK] for start in starts]


def _keys(values: object, offsets: object, num_items: int) -> np.ndarray:
    """Sorted distinct row * N + item of a ragged set given as (values [E], offsets [B+1])."""
    offsets = np.asarray(offsets)
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return np.unique(rows * num_items + np.asarray(values))


def _ranks_from_sparse(
    scores: sp.csr_array,
    targets: np.ndarray,
    excluded: np.ndarray,
    place: np.ndarray,
    include: np.ndarray,
) -> np.ndarray:
    """Ranks [B] of `targets` by (score descending, place ascending) among the items in `include`
    (bool [N]), without the `excluded` keys row * N + item.
    """
    num_rows, num_items = scores.shape
    scores.sum_duplicates()
    scores.eliminate_zeros()
    rows = np.repeat(np.arange(num_rows), np.diff(scores.indptr))
    items, values = scores.indices.astype(np.int64), scores.data
    is_target = items == targets[rows]
    target_score = np.zeros(num_rows)
    target_score[rows[is_target]] = values[is_target]

    keys = rows * num_items + items
    ahead = place[items] < place[targets[rows]]
    wins = (values > target_score[rows]) | ((values == target_score[rows]) & ahead)
    allowed = include[items] & ~np.isin(keys, excluded, assume_unique=True)
    ranks = 1 + np.bincount(rows[wins & allowed & ~is_target], minlength=num_rows)

    # a target without a score also loses to the items without one that are more popular
    taken_rows, taken_items = np.divmod(np.union1d(keys, excluded), num_items)
    taken_ahead = include[taken_items] & (place[taken_items] < place[targets[taken_rows]])
    places = np.zeros(num_items, dtype=np.int64)
    places[place] = include
    ahead_of = np.cumsum(places) - places  # included items that are more popular, by place
    free = ahead_of[place[targets]] - np.bincount(taken_rows[taken_ahead], minlength=num_rows)
    return np.where(target_score > 0, ranks, ranks + free)
