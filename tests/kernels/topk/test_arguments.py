"""Bad arguments, the choice of an implementation, exclusion lists."""

import pytest
import torch

from r2ec_kernels import ItemIndex, _dispatch, item_topk
from r2ec_kernels._exact.excluded import normalize_exclude

Q, X = torch.zeros(2, 4), torch.ones(5, 4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"queries": [1.0]}, TypeError, "queries"),
        ({"queries": torch.zeros(2, 3)}, ValueError, "items: expected shape"),
        ({"queries": torch.zeros(4)}, ValueError, "queries: expected shape"),
        ({"items": X.double()}, TypeError, "items: expected float32"),
        ({"items": X.to("meta")}, ValueError, "items: expected device"),
        ({"k": -1}, ValueError, "k: expected at least 0"),
        ({"k": 2.0}, TypeError, "k: expected an int"),
        ({"similarity": "angle"}, ValueError, "similarity"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"exclude": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, "exclude"),
        ({"exclude": torch.zeros(2, 1)}, TypeError, "exclude"),
        ({"exclude": torch.full((2, 1), 5)}, ValueError, "exclude: expected ids in -1..4"),
        ({"exclude": [[1]]}, ValueError, "exclude: expected a list of ids for each of 2"),
        ({"exclude": [[1], [2.5]]}, TypeError, r"exclude\[1\]\[0\]: expected an int, got float"),
        (
            {"exclude": (torch.tensor([1]), torch.tensor([0, 1]))},
            ValueError,
            "offsets",
        ),
        (
            {"exclude": (torch.tensor([1]), torch.tensor([0, 2, 1]))},
            ValueError,
            "offsets",
        ),
        ({"impl": "fast"}, ValueError, "impl"),
        ({"impl": "triton"}, RuntimeError, "triton"),
    ],
)
def test_item_topk_names_the_bad_argument(change, error, words, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"queries": Q, "items": X, "k": 1} | change
    with pytest.raises(error, match=words):
        item_topk(**arguments)


def test_environment_chooses_and_impl_wins(monkeypatch):
    available = frozenset({"torch", "reference"})
    cpu = torch.device("cpu")
    assert _dispatch.resolve("auto", cpu, "op", available) == "torch"
    monkeypatch.setenv("R2EC_IMPL", "reference")
    assert _dispatch.resolve("auto", cpu, "op", available) == "reference"
    assert _dispatch.resolve("torch", cpu, "op", available) == "torch"
    monkeypatch.setenv("R2EC_IMPL", "triton")
    with pytest.raises(RuntimeError, match="R2EC_IMPL"):
        _dispatch.resolve("auto", cpu, "op", available)
    monkeypatch.setenv("R2EC_IMPL", "nonsense")
    with pytest.raises(ValueError, match="R2EC_IMPL"):
        _dispatch.resolve("auto", cpu, "op", available)


def test_check_mode_finds_values_that_are_not_finite(monkeypatch):
    bad = X.clone()
    bad[3, 1] = float("nan")
    monkeypatch.setenv("R2EC_CHECK", "1")
    with pytest.raises(ValueError, match="items"):
        item_topk(Q, bad, 1)
    with pytest.raises(ValueError, match="queries"):
        ItemIndex(X).search(torch.full((1, 4), float("inf")), 1)


def test_normalize_exclude_forms():
    padded = torch.tensor([[3, -1, 3], [-1, -1, -1], [-1, 0, 2]])
    values, offsets = normalize_exclude(padded, 3, 4, torch.device("cpu"))
    assert values.tolist() == [3, 3, 0, 2] and offsets.tolist() == [0, 2, 2, 4]
    ragged = (torch.tensor([3, -1, 3, -1, 0, 2]), torch.tensor([0, 3, 3, 6]))
    values, offsets = normalize_exclude(ragged, 3, 4, torch.device("cpu"))
    assert values.tolist() == [3, 3, 0, 2] and offsets.tolist() == [0, 2, 2, 4]
    values, offsets = normalize_exclude(None, 3, 4, torch.device("cpu"))
    assert values.numel() == 0 and offsets.tolist() == [0, 0, 0, 0]
