"""Problems whose scores every library computes without a rounding error, and rankings compared."""

import numpy as np
import torch

METRICS = ("hit_rate", "ndcg", "mrr")
KS = (1, 5, 10, 20)


def integers(rows: int, dim: int, seed: int, high: int = 8) -> np.ndarray:
    """float32 [rows, dim] of whole numbers in -high..high: sums of their products are exact in
    float32, and many are equal."""
    rng = np.random.default_rng(seed)
    return rng.integers(-high, high + 1, (rows, dim)).astype(np.float32)


def scores(queries: np.ndarray, items: np.ndarray, similarity: str) -> np.ndarray:
    """The canonical scores, float32 [B, N], written out."""
    q, x = queries.astype(np.float64), items.astype(np.float64)
    if similarity == "l2":
        return -np.sqrt(((q[:, None] - x[None]) ** 2).sum(-1)).astype(np.float32)
    return (q @ x.T).astype(np.float32)


def assert_same_ranking(top, their_scores: np.ndarray, their_ids: np.ndarray) -> None:
    """Equal scores place by place; equal ids but for the order among items of equal score, and for
    which of those that tie with the last place are listed. Unused places: id -1, any score."""
    ids, ours = top.indices.numpy(), top.scores.numpy()
    assert ids.shape == their_ids.shape
    np.testing.assert_array_equal(ids >= 0, their_ids >= 0)
    used = ids >= 0
    np.testing.assert_array_equal(ours[used], their_scores[used])
    assert np.isneginf(ours[~used]).all()
    for row in range(len(ids)):
        here = used[row]
        if not here.any():
            continue
        above = here & (ours[row] > ours[row][here].min())
        for score in np.unique(ours[row][above]):
            tied = above & (ours[row] == score)
            assert set(ids[row][tied]) == set(their_ids[row][tied]), (row, score)
            assert np.all(np.diff(ids[row][tied]) > 0), "equal scores: lower id first"


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
