"""Exact searches of FAISS, USearch and scikit-learn against item_topk and ItemIndex.

Vectors of whole numbers: no library rounds, so that scores are equal, not close."""

import numpy as np
import pytest
import torch
from _support.peer_cases import assert_same_ranking, integers, scores, tensors

from r2ec_kernels import ItemIndex, item_topk, target_stats

pytestmark = pytest.mark.peers

BATCH, COUNT, DIM = 23, 700, 19
QUERIES, ITEMS = integers(BATCH, DIM, 0), integers(COUNT, DIM, 1)
OURS = {
    "item_topk": lambda items, similarity: (
        lambda queries, k, **sets: item_topk(queries, items, k, similarity=similarity, **sets)
    ),
    **{
        scan: lambda items, similarity, scan=scan: (
            ItemIndex(items, similarity=similarity, scan=scan).search
        )
        for scan in ("auto", "none", "int8")
    },
}


@pytest.fixture
def faiss():
    return pytest.importorskip("faiss")


@pytest.fixture
def usearch():
    return pytest.importorskip("usearch.index")


def faiss_scores(distances: np.ndarray, similarity: str) -> np.ndarray:
    """FAISS gives the product, or the squared distance."""
    if similarity == "dot":
        return distances
    return -np.sqrt(distances.astype(np.float64)).astype(np.float32)


def flat(faiss, similarity: str, dim: int = DIM):
    return faiss.IndexFlatIP(dim) if similarity == "dot" else faiss.IndexFlatL2(dim)


@pytest.mark.parametrize("similarity", ["dot", "l2"])
@pytest.mark.parametrize("k", [1, 10, 100, COUNT, COUNT + 5])
@pytest.mark.parametrize("ours", OURS)
def test_faiss_flat(faiss, similarity, k, ours):
    index = flat(faiss, similarity)
    index.add(ITEMS)
    distances, ids = index.search(QUERIES, k)
    queries, items = tensors(QUERIES, ITEMS)
    top = OURS[ours](items, similarity)(queries, k)
    assert_same_ranking(top, faiss_scores(distances, similarity), ids)


@pytest.mark.parametrize("similarity", ["dot", "l2"])
@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("selector", ["batch", "not batch", "range", "bitmap", "and"])
def test_faiss_selectors(faiss, similarity, ours, selector):
    """SearchParameters(sel=...): `include` lets ids in, `exclude` keeps them out."""
    some = np.unique(np.random.default_rng(2).integers(0, COUNT, 150))
    mask = np.zeros(COUNT, bool)
    mask[some] = True
    batch = faiss.IDSelectorBatch(some)
    part = faiss.IDSelectorRange(100, 300)
    chosen, sets = {
        "batch": (batch, {"include": some}),
        "not batch": (faiss.IDSelectorNot(batch), {"exclude": [some.tolist()] * BATCH}),
        "range": (part, {"include": np.arange(100, 300)}),
        "bitmap": (
            faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little")),
            {"include": torch.from_numpy(mask)},
        ),
        "and": (
            faiss.IDSelectorAnd(part, faiss.IDSelectorNot(batch)),
            {"include": np.arange(100, 300), "exclude": [some.tolist()] * BATCH},
        ),
    }[selector]
    index = flat(faiss, similarity)
    index.add(ITEMS)
    distances, ids = index.search(QUERIES, 250, params=faiss.SearchParameters(sel=chosen))
    queries, items = tensors(QUERIES, ITEMS)
    top = OURS[ours](items, similarity)(queries, 250, **sets)
    assert_same_ranking(top, faiss_scores(distances, similarity), ids)


@pytest.mark.parametrize("scan", ["auto", "none", "int8"])
def test_faiss_id_map_written_in_place(faiss, scan):
    """Add, remove and overwrite by id, as IndexIDMap2 does it."""
    rng = np.random.default_rng(3)
    theirs = faiss.IndexIDMap2(faiss.IndexFlatIP(DIM))
    theirs.add_with_ids(ITEMS, np.arange(COUNT))
    ours = ItemIndex(torch.from_numpy(ITEMS.copy()), scan=scan)
    for step in range(6):
        gone, changed = np.split(rng.permutation(ours.ids.numpy())[:60], 2)
        rows, new = integers(30, DIM, 10 + step), integers(20, DIM, 20 + step)
        theirs.remove_ids(np.concatenate([gone, changed]))
        theirs.add_with_ids(rows, changed)
        ours.remove(gone)
        ours.write(torch.from_numpy(changed), torch.from_numpy(rows))
        theirs.add_with_ids(new, ours.append(torch.from_numpy(new)).numpy())
        assert len(ours) == theirs.ntotal
        distances, ids = theirs.search(QUERIES, 50)
        assert_same_ranking(ours.search(torch.from_numpy(QUERIES), 50), distances, ids)
        one = int(changed[0])
        np.testing.assert_array_equal(theirs.reconstruct(one), ours.items[one].numpy())


@pytest.mark.parametrize(("kind", "dtype"), [("QT_fp16", "float16"), ("QT_bf16", "bfloat16")])
@pytest.mark.parametrize("ours", OURS)
def test_faiss_half_precision_tables(faiss, kind, dtype, ours):
    index = faiss.IndexScalarQuantizer(
        DIM, getattr(faiss.ScalarQuantizer, kind), faiss.METRIC_INNER_PRODUCT
    )
    index.train(ITEMS)
    index.add(ITEMS)
    distances, ids = index.search(QUERIES, 40)
    queries, items = (x.to(getattr(torch, dtype)) for x in tensors(QUERIES, ITEMS))
    assert_same_ranking(OURS[ours](items, "dot")(queries, 40), distances, ids)


@pytest.mark.parametrize("ours", OURS)
def test_faiss_empty(faiss, ours):
    """No items, and no queries."""
    index = faiss.IndexFlatIP(DIM)
    empty = torch.empty(0, DIM)
    distances, ids = index.search(QUERIES, 3)
    assert_same_ranking(
        OURS[ours](empty, "dot")(torch.from_numpy(QUERIES), 3), np.asarray(distances), ids
    )
    index.add(ITEMS)
    distances, ids = index.search(QUERIES[:0], 3)
    assert_same_ranking(OURS[ours](torch.from_numpy(ITEMS), "dot")(empty, 3), distances, ids)


@pytest.mark.parametrize("similarity", ["dot", "l2"])
def test_rank_is_a_count_of_faiss_range_search(faiss, similarity):
    """Items above the target's score are those of a range search with that radius; equal ones
    with a lower id come before the target."""
    targets = np.random.default_rng(4).integers(0, COUNT, BATCH)
    index = flat(faiss, similarity)
    index.add(ITEMS)
    queries, items = tensors(QUERIES, ITEMS)
    rank = target_stats(queries, items, targets, similarity=similarity).rank
    all_scores = scores(QUERIES, ITEMS, similarity)
    for row, target in enumerate(targets.tolist()):
        own = all_scores[row, target]
        radius = float(own if similarity == "dot" else round(float(own) ** 2))
        _, _, better = index.range_search(QUERIES[row : row + 1], radius)
        tied = int((all_scores[row, :target] == own).sum())
        assert int(rank[row]) == 1 + len(better) + tied


@pytest.mark.parametrize("metric", ["ip", "l2sq"])
@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("ours", OURS)
def test_usearch_exact(usearch, metric, k, ours):
    """USearch gives 1 - product, or the squared distance."""
    found = usearch.search(ITEMS, QUERIES, k, metric, exact=True, threads=1)
    distances = np.asarray(found.distances, np.float64)
    theirs = 1 - distances if metric == "ip" else -np.sqrt(distances)
    similarity = "dot" if metric == "ip" else "l2"
    queries, items = tensors(QUERIES, ITEMS)
    top = OURS[ours](items, similarity)(queries, k)
    assert_same_ranking(top, theirs.astype(np.float32), np.asarray(found.keys).astype(np.int64))


@pytest.mark.parametrize("ours", OURS)
def test_usearch_exact_cosine(usearch, ours):
    """Rounded: scores place by place, and the score of each item that is listed."""
    queries, items = QUERIES.astype(np.float64), ITEMS.astype(np.float64)
    found = usearch.search(items, queries, 50, "cos", exact=True, threads=1)
    top = OURS[ours](torch.from_numpy(ITEMS), "cosine")(torch.from_numpy(QUERIES), 50)
    np.testing.assert_allclose(top.scores.numpy(), 1 - np.asarray(found.distances), atol=1e-6)
    queries, items = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, items))
    listed = np.take_along_axis(queries @ items.T, top.indices.numpy(), 1)
    np.testing.assert_allclose(top.scores.numpy(), listed, atol=1e-7)


def test_usearch_index_after_removals(usearch):
    index = usearch.Index(ndim=DIM, metric="ip", dtype="f32")
    index.add(np.arange(COUNT), ITEMS)
    gone = np.arange(0, COUNT, 3)
    for key in gone.tolist():
        index.remove(key)
    ours = ItemIndex(torch.from_numpy(ITEMS.copy()))
    ours.remove(gone)
    assert len(index) == len(ours)
    found = index.search(QUERIES, 20, exact=True, threads=1)
    theirs = (1 - np.asarray(found.distances, np.float64)).astype(np.float32)
    top = ours.search(torch.from_numpy(QUERIES), 20)
    assert_same_ranking(top, theirs, np.asarray(found.keys).astype(np.int64))


@pytest.mark.parametrize("similarity", ["l2", "cosine"])
@pytest.mark.parametrize("ours", OURS)
def test_scikit_learn_brute_force(similarity, ours):
    """Against float64, on vectors of any scale, half of which are nearly the other half."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(5)
    queries, items = (rng.standard_normal((n, 33)).astype(np.float32) for n in (9, 400))
    items[200:] = items[:200] * np.float32(1 + 1e-6)
    items *= np.exp2(rng.integers(-6, 7, (400, 1))).astype(np.float32)
    metric = {"l2": "euclidean", "cosine": "cosine"}[similarity]
    theirs = neighbors.NearestNeighbors(algorithm="brute", metric=metric)
    theirs.fit(items.astype(np.float64))
    distances, _ = theirs.kneighbors(queries.astype(np.float64), 400)
    expected = -distances if similarity == "l2" else 1 - distances
    top = OURS[ours](torch.from_numpy(items), similarity)(torch.from_numpy(queries), 400)
    np.testing.assert_allclose(top.scores.numpy(), expected, rtol=2e-7, atol=2e-7)
    assert all(sorted(row) == list(range(400)) for row in top.indices.tolist())


def test_zero_vectors_under_cosine_score_zero_as_in_scikit_learn():
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    items = ITEMS[:40].copy()
    items[[3, 17]] = 0
    theirs = pairwise.cosine_similarity(QUERIES.astype(np.float64), items.astype(np.float64))
    top = item_topk(*tensors(QUERIES, items), 40, similarity="cosine")
    ours = np.empty_like(theirs)
    np.put_along_axis(ours, top.indices.numpy(), top.scores.numpy().astype(np.float64), 1)
    np.testing.assert_allclose(ours, theirs, atol=1e-7)
    assert (ours[:, [3, 17]] == 0).all()
