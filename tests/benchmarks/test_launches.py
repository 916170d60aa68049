"""benchmarks/launches.py: what a public call costs on the Triton path, and what it may cost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from _support.interpreter import interpreter_problem
from _support.processes import environment

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "launches.py"
MOST = 40  # device operations of a call
MOST_OF_A_LOSS = 16  # beside three for each block and tile; 16-bit states have two more, default
# item_targets one


@pytest.fixture(scope="module")
def counts(tmp_path_factory) -> list[dict]:
    if problem := interpreter_problem():
        pytest.skip(problem)
    file = tmp_path_factory.mktemp("launches") / "rows.json"
    command = [
        sys.executable,
        "-m",
        "_support.old_triton",
        BENCHMARK,
        "--ops",
        "search",
        "reward",
        "loss",
        "--batches",
        "1",
        "24",
    ]
    subprocess.run([*command, "--json", file], env=environment(), check=True, capture_output=True)
    return json.loads(file.read_text())


@pytest.fixture
def rows(counts) -> list[dict]:
    return [row for row in counts if not row["call"].startswith("recpo_loss")]


def test_a_loss_costs_three_operations_a_block_and_a_few_a_call(counts):
    losses = [row for row in counts if row["call"].startswith("recpo_loss")]
    assert len(losses) == 4
    for row in losses:
        blocks = row["launches"]["update_kernel"]  # one for each tile of tokens and block of words
        assert blocks == 3 and row["operations"] - 3 * blocks <= MOST_OF_A_LOSS, row["names"]
        assert row["waits"] == 0, row["names"]


def test_a_search_costs_the_same_for_any_batch_and_waits_for_nothing(rows):
    calls = {row["call"] for row in rows}
    assert {"item_topk", "item_topk, exclude", "ItemIndex(int8).search, exclude"} <= calls
    assert {"item_topk, include", "ItemIndex(int8).search, both lists"} <= calls
    for call in calls:
        one, many = (row for row in rows if row["call"] == call)
        assert one["operations"] == many["operations"] <= MOST, (call, one["names"], many["names"])
        assert one["waits"] == many["waits"] == 0, call


def test_rows_of_an_allow_list_are_gathered_without_a_wait():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch; from launches import counted\n"
        "from r2ec_kernels._exact.included import Table, gather\n"
        "table, ids = Table(torch.ones(50, 4)), torch.tensor([4, 2, 4, 60])\n"
        "with counted() as cost:\n"
        "    gather(table, ids, None); gather(table, ids, torch.arange(49, -1, -1))\n"
        "print(cost.waits)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(BENCHMARK.parent)],
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == ["0"]


def test_it_counts_what_waits_for_the_host():
    """The counter sees waits: else the test above could not fail."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch; from launches import counted\n"
        "with counted() as cost:\n"
        "    x = torch.ones(4); x.sum().item(); x.tolist(); x[x > 0]; x.nonzero(); x.view(2, 2)\n"
        "print(cost.waits, cost.operations)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(BENCHMARK.parent)],
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    # ones, sum, item, comparison, selection, nonzero; tolist is a wait besides
    assert run.stdout.split() == ["4", "6"]
