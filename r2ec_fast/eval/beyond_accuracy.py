"""What recommended lists are like, whether or not they hold the target.

Coverage, novelty, diversity and popularity, as RecTools defines them (`CatalogCoverage`,
`MeanInvUserFreq`, `IntraListDiversity`, `AvgRecPopularity`), with one list an example. What counts
as known of an item are its training events alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike

from r2ec_fast.data.splits import training_events
from r2ec_fast.eval.metrics import means_with_errors

if TYPE_CHECKING:
    from r2ec_fast.data import RecDataset

LIST_LENGTH = 10  # of the lists that an evaluation looks at
COLUMNS = tuple(f"{name}@{LIST_LENGTH}" for name in ("coverage", "novelty", "diversity", "arp"))


@dataclass(frozen=True, eq=False)
class ItemCounts:
    """How well known the N items are from the training events.

    Args:
        events: [N] training events of each item.
        users: [N] users who have it among their training events.
        num_users: users with training events.
    """

    events: np.ndarray
    users: np.ndarray
    num_users: int

    @classmethod
    def of(cls, dataset: RecDataset) -> ItemCounts:
        """The counts of a data set's training events."""
        user, item, _ = training_events(dataset)
        size = dataset.data.num_items
        pairs = np.unique(user * size + item)
        return cls(
            events=np.bincount(item, minlength=size),
            users=np.bincount(pairs % size, minlength=size),
            num_users=len(np.unique(user)),
        )


def words(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters and digits."""
    return re.findall(r"[^\W_]+", text.lower())


def text_vectors(texts: Sequence[str]) -> sp.csr_array:
    """TF-IDF vectors of N texts, [N, V] with rows of length 1 (a text without words: zeros).

    An entry is the word's count times log((1 + N) / (1 + texts with the word)) + 1. They depend on
    no model, so that the diversities of two models can be compared.
    """
    counts = [Counter(words(text)) for text in texts]
    vocabulary = {word: i for i, word in enumerate(sorted(set().union(*counts)))}
    row = np.repeat(np.arange(len(counts)), [len(count) for count in counts])
    column = np.array([vocabulary[word] for count in counts for word in count], dtype=np.int64)
    value = np.array([n for count in counts for n in count.values()], dtype=np.float64)
    documents = np.bincount(column, minlength=len(vocabulary))
    value *= (np.log((1 + len(counts)) / (1 + documents)) + 1)[column]
    value /= np.sqrt(np.bincount(row, weights=value**2, minlength=len(counts)))[row]
    return sp.coo_array((value, (row, column)), shape=(len(counts), len(vocabulary))).tocsr()


def beyond_accuracy(
    lists: np.ndarray,
    counts: ItemCounts,
    vectors: sp.csr_array,
    *,
    users: ArrayLike | None = None,
) -> dict[str, float]:
    """Coverage, novelty, diversity and popularity of X recommended lists.

    Args:
        lists: [X, k] internal ids of the items recommended for each example, distinct in a row;
            -1 where a list is shorter. Empty lists (a filter that leaves a user nothing) count for
            nothing.
        counts: of the training events.
        vectors: [N, V] of the items' texts, rows of length 1 or 0 (`text_vectors`).
        users: [X], whose example each is; standard errors then count users as independent.

    Returns:
        `coverage@k`, the share of the catalog that stands in any list; and with their standard
        errors (`/se`), means over the lists of
        `novelty@k`, the mean over the list of -log2(users of the item / all users), an item that
        nobody has counting as one user's (mean inverse user frequency);
        `diversity@k`, the mean of 1 - cosine over all pairs of the list, 0 for fewer than two items
        (intra-list diversity);
        `arp@k`, the mean number of training events of the list's items (average recommendation
        popularity).

    Raises:
        ValueError: `lists` is not [X, k] with X and k at least 1, all are empty, or ids lie outside
            the catalog.
    """
    lists = _checked(lists, len(counts.events))
    some = (lists >= 0).any(1)
    lists, users = lists[some], None if users is None else np.asarray(users)[some]
    k, present = lists.shape[1], lists >= 0
    length = present.sum(1)
    row = np.repeat(np.arange(len(lists)), length)
    item = lists[present]

    def list_mean(value: np.ndarray) -> np.ndarray:
        return np.bincount(row, weights=value[item], minlength=len(lists)) / length

    novelty = -np.log2(np.maximum(counts.users, 1) / counts.num_users)
    means = {
        f"novelty@{k}": list_mean(novelty),
        f"diversity@{k}": _diversity(row, item, length, vectors),
        f"arp@{k}": list_mean(counts.events.astype(np.float64)),
    }
    found = means_with_errors(means, len(lists), users)
    del found["examples"]
    return {f"coverage@{k}": len(np.unique(item)) / len(counts.events), **found}


def _checked(lists: np.ndarray, num_items: int) -> np.ndarray:
    lists = np.asarray(lists)
    if lists.ndim != 2 or lists.size == 0:
        raise ValueError(
            f"lists must have shape [X, k] with X, k >= 1, got shape {list(lists.shape)}"
        )
    if lists.min() < -1 or lists.max() >= num_items:
        raise ValueError(
            f"lists: expected ids in 0..{num_items - 1}, or -1 for none, "
            f"got {lists.min()}..{lists.max()}"
        )
    if (lists < 0).all():
        raise ValueError(f"lists: expected an item in some row, got {len(lists)} empty rows")
    return lists


def _diversity(
    row: np.ndarray, item: np.ndarray, length: np.ndarray, vectors: sp.csr_array
) -> np.ndarray:
    """Mean of 1 - cosine over the pairs of each list, float64 [X]; `row` and `item` [E] hold the
    entries of the lists. The cosines of all pairs sum up to |sum of the vectors|^2 less the
    vectors' own squares, so that no pair is looked at."""
    member = sp.coo_array((np.ones(len(row)), (row, item)), shape=(len(length), vectors.shape[0]))
    total = member.tocsr() @ vectors
    own = np.bincount(row, weights=vectors.power(2).sum(1)[item], minlength=len(length))
    pairs = length * (length - 1)
    cosines = total.power(2).sum(1) - own
    return np.where(pairs > 0, 1 - cosines / np.maximum(pairs, 1), 0.0)
