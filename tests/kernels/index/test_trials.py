"""Which way of a call the first calls of its kind choose (``index.autoselect.Trials``)."""

import pytest
import torch

from r2ec_kernels import ItemIndex, item_topk
from r2ec_kernels.index import autoselect
from r2ec_kernels.index.autoselect import Trials

FORESEEN = {"far": 9.0, "near": 1.3, "best": 1.0}


def call(trials: Trials, kind: str, seconds: dict[str, list[float]]) -> str:
    """One call, that takes the first of its way's ``seconds``; the way."""
    name = trials.choose(kind, lambda: FORESEEN)
    trials.took(kind, name, seconds[name].pop(0))
    return name


def test_calls_decide_between_ways_that_are_foreseen_to_be_close():
    trials = Trials()
    seconds = {"best": [1.0] * 10, "near": [5.0] + [0.9] * 10}  # a first turn does not count
    taken = [call(trials, "a", seconds) for _ in range(12)]
    assert taken[:8] == ["best", "near"] * 4
    assert taken[8:] == ["near"] * 4


def test_the_first_turn_of_a_way_does_not_count():
    trials = Trials()
    seconds = {"best": [1.0] * 10, "near": [0.1] + [1.1] * 10}
    assert [call(trials, "a", seconds) for _ in range(9)][-1] == "best"


def test_a_kind_is_foreseen_once_and_decides_for_itself():
    trials, asked = Trials(), []

    def foreseen() -> dict[str, float]:
        asked.append(1)
        return FORESEEN

    for _ in range(3):
        trials.choose("a", foreseen)  # calls that were interrupted: nobody says what they took
    assert len(asked) == 1
    trials.choose("b", foreseen)
    assert len(asked) == 2


def test_one_way_is_taken_at_once():
    trials = Trials()
    assert trials.choose("a", lambda: {"only": 1.0, "far": 2.0}) == "only"
    trials.took("a", "only", 3.0)
    assert trials.choose("a", lambda: pytest.fail("asked again")) == "only"


def test_no_more_kinds_are_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(autoselect, "_KINDS", 2)
    trials = Trials()
    for kind in "abcde":
        trials.choose(kind, lambda: {"only": 1.0})
    assert len(trials._turns) <= 2 and len(trials._fastest) <= 2
    trials.took("a", "only", 1.0)  # a kind that was forgotten meanwhile


@pytest.mark.parametrize("batch", [1, 16, 64])
def test_results_are_the_same_at_every_turn(batch: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(autoselect, "_CLOSE", 1e9)  # every way there is gets its turns
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(4096, 32, generator=generator)
    queries = torch.randn(batch, 32, generator=generator)
    index, wanted = ItemIndex(items), item_topk(queries, items, 10)
    scans = set()
    for _ in range(24):
        found = index.search(queries, 10)
        assert torch.equal(found.indices, wanted.indices) and torch.equal(
            found.scores, wanted.scores
        )
        scans.add(index.last_search.scan)
    assert len(scans) > 1
