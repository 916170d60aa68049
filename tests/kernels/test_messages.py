"""What callers may give: numpy integers, arrays and lists of ids. What they may not is refused by a
message that names the argument, what was expected and what came."""

import itertools

import numpy as np
import pytest
import torch

from r2ec_kernels import (
    ItemIndex,
    RecPOLossConfig,
    grouped_advantage,
    item_topk,
    linear_logprob,
    recpo_reward,
    reward_and_advantage,
    sharded_target_stats,
    sharded_topk,
    target_stats,
)

B, N, D = 3, 20, 4
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
Q = X[:B] * 2
IDS = [5, 0, 7]
FORMS = {
    "tensor": torch.tensor(IDS),
    "int32 tensor": torch.tensor(IDS, dtype=torch.int32),
    "uint8 tensor": torch.tensor(IDS, dtype=torch.uint8),
    "strided tensor": torch.tensor([IDS, IDS]).T[:, 0],
    "array": np.array(IDS),
    "int32 array": np.array(IDS, dtype=np.int32),
    "reversed array": np.array(IDS[::-1])[::-1],
    "read-only array": np.frombuffer(np.array(IDS).tobytes(), dtype=np.int64),
    "list": IDS,
    "tuple": tuple(IDS),
    "list of numpy integers": [np.int64(i) for i in IDS],
    "list of tensors": [torch.tensor(i) for i in IDS],
}


@pytest.mark.parametrize("k", [np.int64(4), np.int32(4), np.uint8(4), torch.tensor(4), np.array(4)])
def test_integers_of_any_kind(k):
    want = item_topk(Q, X, 4)
    index = ItemIndex(X)
    for got in (item_topk(Q, X, k), item_topk(Q, X, k, impl="reference"), index.search(Q, k)):
        assert torch.equal(got.indices, want.indices)
    assert recpo_reward(torch.tensor([4]), torch.tensor([-1.0]), ndcg_k=k) > 0.1
    assert grouped_advantage(torch.rand(2, 5), best=k).best.sum() == 8
    assert RecPOLossConfig(best=k).best == 4


@pytest.mark.parametrize("form", sorted(FORMS))
def test_ids_in_any_form(form):
    ids = FORMS[form]
    want = target_stats(Q, X, torch.tensor(IDS))
    assert torch.equal(target_stats(Q, X, ids).rank, want.rank)
    index = ItemIndex(X)
    assert torch.equal(index.target_stats(Q, ids).rank, want.rank)
    index.write(ids, torch.ones(3, D))
    assert (index.items[IDS] == 1).all()
    index.remove(ids)
    assert len(index) == N - 3 and not set(IDS) & set(index.ids.tolist())


def test_a_range_and_an_empty_array():
    index = ItemIndex(X)
    index.write(range(3), torch.ones(3, D))
    index.remove(range(0, 10, 3))
    index.remove(np.array([]))
    index.remove([])
    assert index.ids.tolist() == [i for i in range(N) if i not in range(0, 10, 3)]


EXCLUDED = [[5, 0], [], [7]]
EXCLUDE_FORMS = {
    "padded tensor": torch.tensor([[5, 0], [-1, -1], [7, -1]]),
    "padded int32": torch.tensor([[5, 0], [-1, -1], [7, -1]], dtype=torch.int32),
    "padded array": np.array([[5, 0], [-1, -1], [7, -1]]),
    "pair of tensors": (torch.tensor([5, 0, 7]), torch.tensor([0, 2, 2, 3])),
    "pair of arrays": (np.array([5, 0, 7]), np.array([0, 2, 2, 3])),
    "pair of lists": ([5, 0, 7], [0, 2, 2, 3]),
    "two tensors in a list": [torch.tensor([5, 0, 7]), torch.tensor([0, 2, 2, 3])],
    "lists": EXCLUDED,
    "lists with -1": [[5, 0], [-1], [-1, 7]],
    "arrays": [np.array(row, dtype=int) for row in EXCLUDED],
    "tensors": [torch.tensor(row, dtype=torch.int64) for row in EXCLUDED],
    "sets": [set(row) for row in EXCLUDED],
    "tuples and ranges": [(5, 0), range(0), range(7, 8)],
}


@pytest.mark.parametrize("form", sorted(EXCLUDE_FORMS))
def test_exclusions_in_any_form(form):
    exclude = EXCLUDE_FORMS[form]
    given = torch.tensor([[5, 0], [-1, -1], [7, -1]])
    index = ItemIndex(X)
    want = item_topk(Q, X, N, exclude=given, impl="reference")
    for got in (item_topk(Q, X, N, exclude=exclude), index.search(Q, N, exclude=exclude)):
        assert torch.equal(got.indices, want.indices)
    targets = torch.tensor([1, 2, 3])
    want = target_stats(Q, X, targets, exclude=given, impl="reference")
    for got in (
        target_stats(Q, X, targets, exclude=exclude),
        index.target_stats(Q, targets, exclude=exclude),
    ):
        assert torch.equal(got.rank, want.rank)


def test_lists_of_two_queries():
    got = item_topk(Q[:2], X, N, exclude=[[5, 0], [7]])
    want = item_topk(Q[:2], X, N, exclude=torch.tensor([[5, 0], [7, -1]]))
    assert torch.equal(got.indices, want.indices)
    with pytest.raises(ValueError, match="exclude: expected a tuple .* might be either"):
        item_topk(Q[:2], X, 1, exclude=[torch.tensor([5, 0]), torch.tensor([7])])


def sparse(kind):
    if kind == "csr":
        return X.to_sparse_csr()
    return X.to_sparse()


VECTORS = {
    "sparse_coo": (sparse("coo"), TypeError),
    "sparse_csr": (sparse("csr"), TypeError),
    "bool": (torch.ones(N, D, dtype=torch.bool), TypeError),
    "complex64": (torch.ones(N, D, dtype=torch.complex64), TypeError),
    "int64": (torch.ones(N, D, dtype=torch.int64), TypeError),
    "meta": (torch.ones(N, D, device="meta"), ValueError),
    "ndarray": (np.ones((N, D)), TypeError),
    "list": ([[1.0] * D], TypeError),
    "NoneType": (None, TypeError),
    "nested": (torch.nested.nested_tensor([torch.ones(2, D), torch.ones(1, D)]), TypeError),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("kind", sorted(VECTORS))
def test_vectors_that_cannot_be_read_are_named(kind):
    vectors, error = VECTORS[kind]
    index = ItemIndex(X)
    targets = torch.zeros(N, dtype=torch.int64)
    calls = {
        "queries": (
            lambda: item_topk(vectors, X, 1),
            lambda: index.search(vectors, 1),
            lambda: target_stats(vectors, X, targets),
            lambda: index.target_stats(vectors, targets),
            lambda: sharded_topk(vectors, X, 1, first_id=0),
            lambda: sharded_target_stats(vectors, X, targets, first_id=0),
        ),
        "items": (
            lambda: item_topk(Q, vectors, 1),
            lambda: target_stats(Q, vectors, IDS),
            lambda: ItemIndex(vectors),
        ),
        "local_items": (
            lambda: sharded_topk(Q, vectors, 1, first_id=0),
            lambda: sharded_target_stats(Q, vectors, IDS, first_id=0),
        ),
        "rows": (lambda: index.append(vectors), lambda: index.write(range(N), vectors)),
        "hidden": (lambda: linear_logprob(vectors, X, targets),),
        "weight": (lambda: linear_logprob(X, vectors, targets),),
    }
    for name, each in calls.items():
        for call in each:
            with pytest.raises(error, match=f"^{name}: expected.*{kind}"):
                call()
    assert torch.equal(index.items, X)


BAD_IDS = {
    "float32": torch.zeros(3),
    "bool": torch.ones(3, dtype=torch.bool),
    "complex64": torch.zeros(3, dtype=torch.complex64),
    "float64": np.zeros(3),
    "array of bool": np.ones(3, dtype=bool),
    "<U1": np.array(["a", "b", "c"]),
    "sparse_coo": torch.tensor(IDS).to_sparse(),
    "meta": torch.tensor(IDS, device="meta"),
    r"\[\]": torch.tensor(5),
    r"\[3, 1\]": torch.tensor([[1], [2], [3]]),
    r"\[1\]: expected an int, got float": [1, 2.0, 3],
    r"\[0\]: expected an int, got bool": [True, 2, 3],
    r"\[2\]: expected an int, got str": [1, 2, "3"],
    r"\[0\]: expected an int, got list": [[1, 2, 3]],
    "got 1180591620717411303424": [1, 2, 2**70],
    "set": {1, 2, 3},
    "int$": 5,
    "str": "123",
    "NoneType": None,
}


@pytest.mark.parametrize("words", sorted(BAD_IDS))
def test_ids_that_are_none_are_named(words):
    ids = BAD_IDS[words]
    index = ItemIndex(X)
    calls = {
        "ids": (lambda: index.write(ids, X[:3]), lambda: index.remove(ids)),
        "targets": (
            lambda: target_stats(Q, X, ids),
            lambda: sharded_target_stats(Q, X, ids, first_id=0),
            lambda: index.target_stats(Q, ids),
        ),
    }
    for name, each in calls.items():
        for call in each:
            with pytest.raises((TypeError, ValueError), match=f"^{name}.*{words}"):
                call()
    assert torch.equal(index.items, X)


def test_no_message_says_that_a_type_was_expected_and_came():
    """ "expected int64, got int64": numpy's int64 where torch's was meant."""
    index = ItemIndex(X)
    arrays = [np.array(5), np.zeros((3, 1), dtype=np.int64), np.zeros((2, 2, 2), dtype=np.int64)]
    for value, call in itertools.product(
        arrays,
        (
            lambda ids: index.remove(ids),
            lambda ids: index.target_stats(Q, ids),
            lambda ids: target_stats(Q, X, ids),
            lambda ids: item_topk(Q, X, 1, exclude=ids) if ids.ndim != 2 else index.remove(ids),
            lambda ids: linear_logprob(Q, X, ids),
        ),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            call(value)
        expected, came = str(caught.value).split("expected ")[1].split(", got ")
        assert expected != came


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: item_topk(Q, X, np.float64(2)), "k: expected an int, got numpy float64"),
        (lambda: item_topk(Q, X, np.bool_(True)), "k: expected an int, got numpy bool"),
        (lambda: item_topk(Q, X, True), "k: expected an int, got bool"),
        (
            lambda: item_topk(Q, X, torch.tensor(True)),
            "k: expected an int, got a tensor of torch.b",
        ),
        (lambda: item_topk(Q, X, torch.tensor([1, 2])), "k: expected an int, got a tensor of"),
        (lambda: item_topk(Q, X, "3"), "k: expected an int, got str"),
        (lambda: item_topk(Q, X, np.int64(-1)), "k: expected at least 0, got -1"),
        (lambda: item_topk(Q, X, 1, temperature="1"), "temperature: expected a number, got str"),
        (lambda: item_topk(Q, X, 1, temperature=None), "temperature: expected a number, got None"),
        (lambda: target_stats(Q, X, IDS, temperature=[1]), "temperature: expected a number, got l"),
        (lambda: target_stats(Q, X, IDS, temperature=float("inf")), "temperature: expected a pos"),
        (lambda: item_topk(Q, X, 1, exclude=7), "exclude: expected None, padded.*got int"),
        (lambda: item_topk(Q, X, 1, exclude="7"), "exclude: expected None, padded.*got str"),
        (lambda: item_topk(Q, X, 1, exclude={7}), "exclude: expected None, padded.*got set"),
        (lambda: item_topk(Q, X, 1, exclude=[[1], [2]]), "exclude: .*each of 3 queries, got 2"),
        (lambda: item_topk(Q, X, 1, exclude=[1, 2, 3]), r"exclude\[0\]: expected int64 .*got int"),
        (lambda: item_topk(Q, X, 1, exclude=([1],) * 3), "exclude: expected .values.*got 3 parts"),
        (lambda: item_topk(Q, X, 1, exclude=[[1], [99], []]), "exclude: expected ids in -1..19"),
        (lambda: item_topk(Q, X, 1, exclude=np.zeros((3, 2))), "exclude: expected int64.*float64"),
        (lambda: item_topk(Q, X, 1, exclude=([0.5], [0, 1, 1, 1])), r"exclude\[0\]: .*got float"),
        (lambda: ItemIndex(X).remove([0, 99]), "ids: expected ids in the index, got 99"),
        (lambda: ItemIndex(X).remove(np.array([1, 1])), "ids: expected distinct ids"),
        (lambda: ItemIndex(X).write([1, 2], X[:1]), "ids: expected one for each of 1 rows, got 2"),
        (lambda: ItemIndex(X).target_stats(Q, [1, 2]), r"targets: expected shape \[3\], got \[2\]"),
        (lambda: sharded_topk(Q, X, 1, first_id=1.5), "first_id: expected an int, got float"),
        (lambda: sharded_topk(Q, X, 1, first_id=True), "first_id: expected an int, got bool"),
        (lambda: sharded_target_stats(Q, X, IDS, first_id="0"), "first_id: expected an int, got s"),
        (lambda: recpo_reward([1], torch.ones(1)), "rank: expected a tensor, got list"),
        (lambda: recpo_reward(np.ones(1), torch.ones(1)), "rank: expected a tensor, got numpy"),
        (lambda: recpo_reward(torch.ones(1, dtype=torch.bool), torch.ones(1)), "rank.*torch.bool"),
        (lambda: recpo_reward(torch.tensor([1]), None), "log_prob: expected a tensor, got None"),
        (lambda: reward_and_advantage(None, None), "rank: expected a tensor, got None"),
        (lambda: grouped_advantage([[1.0]]), "rewards: expected a tensor, got list"),
        (lambda: grouped_advantage(torch.ones(2, 2), best=1.5), "best: expected an int, got float"),
        (lambda: RecPOLossConfig(epsilon="0.2"), "epsilon: expected a number, got str"),
        (lambda: RecPOLossConfig(softcap=[1]), "softcap: expected a number, got list"),
        (lambda: RecPOLossConfig(best=2.5), "best: expected an int, got float"),
        (lambda: RecPOLossConfig(temperature=None), "temperature: expected a number, got None"),
        (lambda: linear_logprob(Q, X, np.zeros(3, int)), "targets: expected a tensor, got numpy"),
        (lambda: linear_logprob(Q, X, torch.zeros(3)), "targets: expected int64, got torch.float"),
    ],
)
def test_messages_name_argument_expected_and_got(call, words):
    with pytest.raises((TypeError, ValueError), match=f"^{words}"):
        call()


def test_strides_and_gradients_are_fine():
    wide = torch.randn(N, 2 * D)
    for items in (wide[:, ::2], wide[:, D:], torch.randn(D, N).T, X.clone().requires_grad_()):
        queries = items[:B]
        want = item_topk(queries, items.detach().contiguous(), 5, impl="reference")
        index = ItemIndex(items)
        for got in (item_topk(queries, items, 5), index.search(queries, 5)):
            assert torch.equal(got.indices, want.indices) and not got.scores.requires_grad
        index.write(IDS, items[:3])
        index.append(items)
        rank = target_stats(queries, items, IDS).rank
        assert torch.equal(rank, target_stats(queries, items, IDS, impl="reference").rank)
    assert torch.equal(item_topk(torch.nn.Parameter(Q), X, 2).indices, item_topk(Q, X, 2).indices)
