"""target_stats: exact ranks against a stable sort, log-probabilities against float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r2ec_kernels import target_stats
from r2ec_kernels._cpu import extension
from r2ec_kernels._exact.scores import canonical_scores
from r2ec_kernels._scan import float32
from r2ec_kernels.rank.impl import common

SIMILARITIES = ["dot", "cosine", "l2"]


@pytest.fixture
def small_blocks(monkeypatch):
    for name in ("_BLOCK", "_PIECE"):
        monkeypatch.setattr(float32, name, 1)
    monkeypatch.setattr(common, "MIN_BLOCK", 64)
    monkeypatch.setattr(common, "BLOCK_ELEMENTS", 1)


def expected(queries, items, targets, similarity, temperature, excluded):
    """numpy: positions in a stable descending sort; log-softmax in float64."""
    scores = canonical_scores(queries, items, similarity, temperature).double().numpy()
    rank, log_prob = [], []
    for row, target, left_out in zip(scores, targets.tolist(), excluded, strict=True):
        alive = np.ones(row.size, bool)
        alive[[v for v in left_out if v not in (-1, target)]] = False
        ids = np.flatnonzero(alive)
        order = ids[np.argsort(-row[ids], kind="stable")]
        rank.append(int(np.flatnonzero(order == target)[0]) + 1)
        top = row[ids].max()
        log_prob.append(row[target] - top - np.log(np.exp(row[ids] - top).sum()))
    return np.array(rank), np.array(log_prob)


def check(queries, items, targets, similarity="dot", temperature=1.0, exclude=None, impl="auto"):
    exact = expected(
        queries,
        items,
        targets,
        similarity,
        temperature,
        [[]] * len(targets) if exclude is None else exclude.tolist(),
    )
    rank, log_prob = target_stats(
        queries,
        items,
        targets,
        similarity=similarity,
        temperature=temperature,
        exclude=exclude,
        impl=impl,
    )
    assert rank.dtype == torch.int64 and log_prob.dtype == torch.float32
    np.testing.assert_array_equal(rank.numpy(), exact[0])
    np.testing.assert_allclose(log_prob.numpy(), exact[1], rtol=3e-6, atol=3e-5)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("count", "dim"), [(1, 3), (63, 60), (500, 576), (1999, 7)])
def test_odd_grid(count, dim, similarity, impl, small_blocks):
    generator = torch.Generator().manual_seed(count)
    items = torch.randn(count, dim, generator=generator)
    items *= torch.exp2(torch.randint(-10, 11, (count, 1), generator=generator))
    for batch in (0, 1, 9):
        queries = torch.randn(batch, dim, generator=generator)
        targets = torch.randint(0, count, (batch,), generator=generator)
        exclude = torch.randint(-1, count, (batch, 12), generator=generator)
        check(queries, items, targets, similarity, 0.02 if similarity == "cosine" else 1.3)
        check(queries, items, targets, similarity, 20.0, exclude, impl=impl)


def adversarial(seed):
    """A small table full of ties, near-ties and repeats, of the target too."""
    rng = np.random.default_rng(seed)
    batch, count, dim = rng.integers(1, 5), rng.integers(1, 130), rng.integers(1, 9)
    kind = seed % 5
    items = rng.normal(size=(count, dim))
    queries = rng.normal(size=(batch, dim))
    if kind == 0:
        items = rng.integers(-1, 2, size=(count, dim)).astype(float)
        queries = rng.integers(-1, 2, size=(batch, dim)).astype(float)
    elif kind == 1:
        items[:] = items[0]
    elif kind == 2:
        items = items[rng.integers(0, max(count // 4, 1), count)]
    elif kind == 3:  # neighbours in float32
        items = items[rng.integers(0, 2, count) % count]
        items *= 1 + rng.integers(-2, 3, (count, dim)) * 2.0**-23
    elif kind == 4:
        items *= 2.0 ** rng.integers(-10, 11, (count, 1))
        items[rng.random(count) < 0.2] = 0
    targets = torch.from_numpy(rng.integers(0, count, batch))
    exclude = torch.from_numpy(rng.integers(-1, count, (batch, rng.integers(0, 9))))
    if exclude.shape[1]:
        exclude[:, 0] = targets  # the target in its own history
    as_float = [torch.from_numpy(x).float() for x in (queries, items)]
    return (*as_float, targets, SIMILARITIES[rng.integers(0, 3)], exclude)


@pytest.mark.parametrize("part", range(4))
def test_rank_is_exact_on_two_thousand_adversarial_cases(part, small_blocks):
    for seed in range(part * 500, part * 500 + 500):
        queries, items, targets, similarity, exclude = adversarial(seed)
        check(queries, items, targets, similarity, 1.0, exclude)


def test_a_target_in_its_own_history_stays_in():
    queries, items = torch.eye(4)[:2], torch.eye(4)
    exclude = torch.tensor([[0, 1], [3, -1]])
    rank, log_prob = target_stats(queries, items, torch.tensor([0, 1]), exclude=exclude)
    assert rank.tolist() == [1, 1]
    e = np.exp(1)
    np.testing.assert_allclose(log_prob.numpy(), [np.log(e / (e + 2))] * 2, rtol=1e-6)


def test_everything_else_excluded():
    items = torch.randn(40, 5)
    exclude = torch.arange(40)[None].repeat(3, 1)
    rank, log_prob = target_stats(
        torch.randn(3, 5), items, torch.tensor([0, 20, 39]), exclude=exclude
    )
    assert rank.tolist() == [1, 1, 1]
    np.testing.assert_allclose(log_prob.numpy(), 0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ragged_and_padded_exclusions_agree(data):
    count = data.draw(st.integers(1, 30))
    lists = data.draw(st.lists(st.lists(st.integers(0, count - 1), max_size=8), max_size=5))
    width = max([len(x) for x in lists], default=0)
    padded = torch.full((len(lists), width), -1)
    for row, values in zip(padded, lists, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=torch.int64)
    lengths = torch.tensor([0, *map(len, lists)])
    flat = torch.tensor([v for values in lists for v in values], dtype=torch.int64)
    queries, items = torch.randn(len(lists), 4).round(), torch.randn(count, 4).round()
    targets = torch.randint(0, count, (len(lists),))
    a = target_stats(queries, items, targets, exclude=padded)
    b = target_stats(queries, items, targets, exclude=(flat, lengths.cumsum(0)))
    assert torch.equal(a.rank, b.rank) and torch.equal(a.log_prob, b.log_prob)


@pytest.mark.parametrize("kind", extension.cpu_kinds())
def test_large_products_that_cancel(kind):
    """A target's score is what is left of products 2^40 times larger: its float64 rounding, which
    depends on the order of the sum, exceeds the bounds of the other rows' scores."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        query = torch.randn(1, 16, generator=generator)
        items = torch.randn(400, 16, generator=generator)
        row = torch.randn(16, generator=generator) * 2.0**47
        row[-2:] = 0
        for column in (-2, -1):
            row[column] = -(query.double() @ row.double())[0] / query[0, column]
        items[333] = row
        with extension.use_cpu(kind):
            rank = target_stats(query, items, [333]).rank
        assert torch.equal(rank, target_stats(query, items, [333], impl="reference").rank)


def test_other_types_and_layouts():
    generator = torch.Generator().manual_seed(5)
    items = torch.randn(30, 700, generator=generator).T  # columns are contiguous
    queries = torch.randn(6, 60, generator=generator)[:, ::2]
    targets = torch.arange(6) * 100
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        for similarity in SIMILARITIES:
            check(queries.to(dtype), items.to(dtype), targets, similarity)


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        ({"targets": torch.tensor([0, 9])}, ValueError, "targets"),
        ({"targets": torch.tensor([0.0, 1.0])}, TypeError, "targets"),
        ({"targets": torch.tensor([0])}, ValueError, "targets"),
        ({"items": torch.ones(9, 5)}, ValueError, "items"),
        ({"similarity": "angle"}, ValueError, "similarity"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"exclude": torch.tensor([[9], [0]])}, ValueError, "exclude"),
    ],
)
def test_bad_arguments_are_named(changes, error, name):
    arguments = {
        "queries": torch.ones(2, 4),
        "items": torch.ones(9, 4),
        "targets": torch.tensor([0, 8]),
    } | changes
    positional = [arguments.pop(k) for k in ("queries", "items", "targets")]
    with pytest.raises(error, match=name):
        target_stats(*positional, **arguments)
