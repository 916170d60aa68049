"""Metrics of ranx and of trec_eval, and ranx' t-test, against ours: one target a user.

ranx' compiled functions take a minute to build: they run interpreted, in one process of their own.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from r2ec_fast.eval.metrics import paired_differences, ranking_metrics
from r2ec_kernels import target_stats

pytestmark = pytest.mark.peers

EXAMPLES, COUNT, KS = 120, 50, (1, 3, 10, 20)
# ranx' name -> what it is of ours where one item is relevant
SAME = {"hit_rate": "hit_rate", "recall": "hit_rate", "hits": "hit_rate", "ndcg": "ndcg"}
SAME |= {"mrr": "mrr", "map": "mrr"}
SCRIPT = """
import json, sys
import ranx
qrels, runs, names, ks = json.load(sys.stdin)
qrels, runs = ranx.Qrels(qrels), {name: ranx.Run(run, name=name) for name, run in runs.items()}
wanted = [f"{name}@{k}" for name in names for k in ks]
values = {key: ranx.evaluate(qrels, run, wanted) for key, run in runs.items()}
values = {key: {n: float(v) for n, v in row.items()} for key, row in values.items()}
report = ranx.compare(qrels, list(runs.values()), metrics=wanted, stat_test="student")
tests = report.comparisons[tuple(runs)]
p = {name: float(tests[name]["p_value"]) for name in wanted}
print(json.dumps([values, p]))
"""


# trec_eval's name -> ours; both count from the scores, whatever the order of the list
TREC = {"success": "hit_rate", "recall": "hit_rate", "ndcg_cut": "ndcg", "map_cut": "mrr"}


def example_scores(seed: int) -> np.ndarray:
    """float32 [EXAMPLES, COUNT], distinct within a row."""
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(COUNT, dtype=np.float32), (EXAMPLES, 1)), axis=1)


@pytest.fixture(scope="module")
def rankings():
    """(ranks by target_stats of two methods, the relevant items, the lists of both); the second's
    scores favour the targets."""
    targets = np.random.default_rng(7).integers(0, COUNT, EXAMPLES)
    methods = {"a": example_scores(1), "b": example_scores(2)}
    methods["b"][np.arange(EXAMPLES), targets] += 2.5
    ranks, runs = {}, {}
    for name, scores in methods.items():
        # each row of scores is a query, the items are unit vectors
        table = torch.eye(COUNT)
        ranks[name] = target_stats(torch.from_numpy(scores), table, targets).rank
        # a run lists the best 20 only: a target below has no rank there
        best = np.argsort(-scores, axis=1)[:, :20]
        runs[name] = {
            f"q{i}": {f"d{j}": float(scores[i, j]) for j in row} for i, row in enumerate(best)
        }
    return ranks, {f"q{i}": {f"d{target}": 1} for i, target in enumerate(targets)}, runs


@pytest.fixture(scope="module")
def results(rankings):
    """(ranks, ranx' values, its p-values)."""
    pytest.importorskip("ranx")
    ranks, qrels, runs = rankings
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([qrels, runs, list(SAME), KS]),
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    values, p = json.loads(done.stdout.splitlines()[-1])
    return ranks, values, p


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("method", ["a", "b"])
def test_metric(results, method, name, k):
    ranks, values, _ = results
    ours = ranking_metrics(ranks[method], ks=KS)
    assert ours[f"{SAME[name]}@{k}"] == pytest.approx(values[method][f"{name}@{k}"], abs=1e-9)


@pytest.mark.parametrize("k", [k for k in KS if k != 3])
@pytest.mark.parametrize("name", TREC)
@pytest.mark.parametrize("method", ["a", "b"])
def test_trec_eval(rankings, method, name, k):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    ranks, qrels, runs = rankings
    judge = pytrec_eval.RelevanceEvaluator(qrels, {f"{name}.{k}"})
    rows = judge.evaluate(runs[method]).values()
    theirs = [row[f"{name}_{k}"] for row in rows]
    ours = ranking_metrics(ranks[method], ks=(k,))[f"{TREC[name]}@{k}"]
    assert len(theirs) == EXAMPLES and 0 < ours < 1
    assert ours == pytest.approx(np.mean(theirs), abs=1e-9)


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("name", ["hit_rate", "ndcg", "mrr"])
def test_paired_t_test(results, name, k):
    """Mean and standard error of a paired difference give ranx' p-value."""
    from scipy import stats

    ranks, _, p = results
    found = paired_differences(ranks["b"], ranks["a"], ks=KS)
    t = found[f"{name}@{k}"] / found[f"{name}@{k}/se"]
    assert 2 * stats.t.sf(abs(t), EXAMPLES - 1) == pytest.approx(p[f"{name}@{k}"], rel=1e-6)
