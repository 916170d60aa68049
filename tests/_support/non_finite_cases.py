"""Tables and queries with numbers that are not finite, and searches and ranks by definition."""

import math

import numpy as np
import torch

from r2ec_kernels._exact.scores import canonical_scores

INF, NAN = float("inf"), float("nan")
WHERE = ("queries", "rows", "both", "many rows", "overflow", "zeros")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(where, dtype, seed=0, batch=5, count=300, d=24):
    """Queries and items with numbers that are not finite in some places."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(batch, d, generator=generator)
    items = torch.randn(count, d, generator=generator)
    if where in ("queries", "both"):
        queries[0, 3], queries[1, 0], queries[2, 5] = NAN, INF, -INF
    if where in ("rows", "both"):
        items[7, 2], items[11, 0], items[200, 23], items[40] = NAN, INF, -INF, NAN
        items[41, 1], items[41, 2] = INF, -INF
    if where == "many rows":
        items[::3, 1] = NAN
        items[1::6, 4] = INF
    if where == "overflow":  # the products, not the numbers
        huge = 3e4 if dtype == torch.float16 else 1e30
        items[::4] *= huge
        queries[1::2] *= huge
    if where == "zeros":
        items[5] = items[9] = 0.0
        items[20, 0], items[21, 1] = NAN, INF
        queries[3] = 0.0
    return queries.to(dtype), items.to(dtype)


def topk_by_definition(queries, items, k, similarity, temperature, exclude):
    """Scores by numpy in float64, then Python's sort of what can be compared."""
    scores = canonical_scores(queries, items, similarity, temperature).numpy()
    want_scores, want_ids = [], []
    for b, row in enumerate(scores):
        hidden = set() if exclude is None else set(exclude[b].tolist())
        able = [i for i in range(len(row)) if not np.isnan(row[i]) and i not in hidden]
        able.sort(key=lambda i: (-row[i], i))
        ids = able[:k] + [-1] * max(0, k - len(able))
        want_ids.append(ids)
        want_scores.append([row[i] if i >= 0 else -INF for i in ids])
    return torch.tensor(np.array(want_scores)), torch.tensor(want_ids)


def stats_by_definition(queries, items, targets, similarity, temperature, exclude):
    """(ranks, log-probabilities) by numpy in float64."""
    scores = canonical_scores(queries, items, similarity, temperature).numpy().astype(float)
    ranks, log_probs = [], []
    for b, target in enumerate(targets.tolist()):
        hidden = set() if exclude is None else set(exclude[b].tolist()) - {target}
        places = [i for i in range(len(items)) if i not in hidden]
        able = [i for i in places if not np.isnan(scores[b, i])]
        own = scores[b, target]
        if np.isnan(own):
            ranks.append(len(places))
            log_probs.append(-INF)
            continue
        ranks.append(1 + sum((-scores[b, i], i) < (-own, target) for i in able))
        row = scores[b, able]
        best = row.max()
        if np.isinf(best):
            log_probs.append(-math.log((row == best).sum()) if own == best else -INF)
        else:
            log_probs.append(own - best - np.log(np.exp(row - best).sum()))
    return torch.tensor(ranks), torch.tensor(log_probs, dtype=torch.float32)
