"""The lists that `rank_examples` makes beside the ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _support.planted import name, planted

from r2ec_fast.eval.ranking import TopItems, rank_examples
from r2ec_fast.packing.ragged import Ragged


@pytest.mark.parametrize("window", [False, True])
def test_a_target_stands_in_its_list_where_its_rank_says(window):
    model, assembler, data = planted()
    marker, items = assembler.builder.marker_ids, data.data.num_items
    named = np.arange(2 * len(data.valid)) % 5  # two reasonings an example
    rows = Ragged.of([name(item) for item in named]).append(marker)
    top = TopItems(model, items)
    settings = {"reasonings": rows, "exclude_window": window, "batch_size": 5}
    ranks, _ = rank_examples(model, assembler, data, data.valid, on_states=top, **settings)
    assert top.lists.shape == (2 * len(data.valid), items)
    targets = data.target(data.valid).repeat(2)
    values, offsets = data.exclude(data.valid, model.prompts.window if window else None)
    for row, (rank, target) in enumerate(zip(ranks, targets, strict=True)):
        seen = values[offsets[row // 2] : offsets[row // 2 + 1]].tolist()
        found = top.lists[row]
        assert set(found[found >= 0].tolist()) == set(range(items)) - set(seen)
        if target not in seen:
            assert found[rank - 1] == target


def test_a_state_that_is_no_number_still_gets_a_list():
    model, _, data = planted()
    top = TopItems(model, 3)
    states = torch.ones(2, model.item_table.shape[1])
    states[1] = torch.nan
    top(states, Ragged.of([[0], [0, 1]]))
    assert top.lists.shape == (2, 3) and (top.lists >= 0).all()
    assert not {0, 1} & set(top.lists[1].tolist())


def test_lists_hold_included_items_alone():
    model, _, _ = planted()
    include = np.zeros(len(model.item_table), dtype=bool)
    include[[1, 3]] = True
    top = TopItems(model, 3, include)
    top(torch.ones(1, model.item_table.shape[1]), Ragged.of([[1]]))
    assert top.lists.tolist() == [[3, -1, -1]]


def test_without_batches_there_are_no_lists():
    model, _, _ = planted()
    assert TopItems(model, 3).lists.shape == (0, 3)
