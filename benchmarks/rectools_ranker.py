"""RecTools' full-ranking step beside the same step on item_topk: docs/guides/use-elsewhere.md.

    python benchmarks/rectools_ranker.py SEQUENCES

SEQUENCES: one user a line, user id and then item ids in order. Needs RecTools and implicit, in an
environment of their own; prints the share of equal recommendations and both times.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from implicit.als import AlternatingLeastSquares
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import ImplicitALSWrapperModel, vector
from rectools.models.rank import Distance, ImplicitRanker
from scipy import sparse

from r2ec_kernels import item_topk

RANDOM = ((12_101, 128, 22_363), (200_000, 128, 2000), (200_000, 512, 1000))  # items, width, users


class ExactRanker(ImplicitRanker):
    def rank(self, subject_ids, k=None, filter_pairs_csr=None, sorted_object_whitelist=None):
        ids, seen = np.asarray(subject_ids), filter_pairs_csr
        queries, items = map(torch.from_numpy, (self.subjects_factors[ids], self.objects_factors))
        far = self.distance == Distance.EUCLIDEAN
        top = item_topk(
            queries,
            items,
            k or len(items),
            similarity="l2" if far else self.distance.value,
            exclude=None if seen is None else (seen.indices, seen.indptr),
            include=sorted_object_whitelist,
        )
        found = top.indices >= 0
        users, scores = ids.repeat(found.sum(1).numpy()), top.scores[found].numpy()
        return users, top.indices[found].numpy(), -scores if far else scores


def compare(name: str, run: Callable[[type], np.ndarray], repeats: int) -> None:
    """``run(ranker class)`` returns the recommended items; both classes take turns."""
    seconds: dict[type, list[float]] = {ImplicitRanker: [], ExactRanker: []}
    items = {}
    for _ in range(repeats):
        for ranker, times in seconds.items():
            started = time.perf_counter()
            items[ranker] = run(ranker)
            times.append(time.perf_counter() - started)
    theirs, ours = (statistics.median(times) for times in seconds.values())
    same = np.mean(items[ImplicitRanker] == items[ExactRanker])
    sys.stdout.write(
        f"{name}: RecTools {theirs:.3f} s, item_topk {ours:.3f} s, {theirs / ours:.2f}x; "
        f"{len(items[ExactRanker]):,} rows, {same:.6f} the same\n"
    )


def read(path: str) -> pd.DataFrame:
    """Interactions of a file of sequences; one day between the events of a user."""
    with open(path) as file:
        rows = [
            (*ids[:1], item, t) for ids in map(str.split, file) for t, item in enumerate(ids[1:])
        ]
    frame = pd.DataFrame(rows, columns=[Columns.User, Columns.Item, "day"])
    frame[Columns.Datetime] = pd.Timestamp("2020-01-01") + pd.to_timedelta(frame.pop("day"), "D")
    return frame.assign(**{Columns.Weight: 1.0})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sequences")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    frame = read(arguments.sequences)
    dataset, users = Dataset.construct(frame), frame[Columns.User].unique()
    als = AlternatingLeastSquares(factors=128, iterations=3, random_state=0)
    model = ImplicitALSWrapperModel(als)
    model.fit(dataset)

    def recommend(ranker: type) -> np.ndarray:
        vector.ImplicitRanker = ranker
        found = model.recommend(users, dataset, k=10, filter_viewed=True)
        return found[Columns.Item].to_numpy()

    compare(f"recommend {len(users):,} users", recommend, arguments.repeats)
    rng = np.random.default_rng(0)
    for count, width, batch in RANDOM:
        factors = (rng.standard_normal((n, width), dtype=np.float32) for n in (batch, count))
        queries, items = factors
        at = (np.repeat(np.arange(batch), 10), rng.integers(0, count, batch * 10))
        seen = sparse.csr_matrix((np.ones(len(at[0]), np.float32), at), shape=(batch, count))

        def rank(ranker: type, queries=queries, items=items, seen=seen) -> np.ndarray:
            made = ranker(Distance.DOT, queries, items, num_threads=torch.get_num_threads())
            return np.asarray(made.rank(np.arange(len(queries)), 10, seen)[1])

        compare(f"rank {batch:,} x {count:,} x {width}", rank, arguments.repeats)


if __name__ == "__main__":
    main()
