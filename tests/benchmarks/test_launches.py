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
DECODERS = {"static": (53, 100, 0), "shared": (53, 107, 3)}  # operations a layer and beside them,
# and waits, for a token of a Llama in bfloat16 after prompts of two lengths
BATCHES = (1, 16, 64, 256)
MOST_OF_A_LOSS = 16  # beside three for each block and tile; 16-bit states have two more, default
# item_targets one


@pytest.fixture(scope="module")
def counts(tmp_path_factory) -> list[dict]:
    if problem := interpreter_problem():
        pytest.skip(problem)
    file = tmp_path_factory.mktemp("launches") / "rows.json"
    return run(file, "--ops", "search", "reward", "loss", "decode", "--batches", "1", "24")


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> list[dict]:
    """Searches of up to 256 queries, whose kernels are counted and not run."""
    if problem := interpreter_problem():
        pytest.skip(problem)
    file = tmp_path_factory.mktemp("launches") / "dry.json"
    return run(file, "--dry", "--ops", "search", "--batches", *map(str, BATCHES))


def run(file: Path, *arguments: str) -> list[dict]:
    command = [sys.executable, "-m", "_support.old_triton", BENCHMARK, *arguments]
    subprocess.run([*command, "--json", file], env=environment(), check=True, capture_output=True)
    return json.loads(file.read_text())


@pytest.fixture
def rows(counts) -> list[dict]:
    return [row for row in counts if not row["call"].startswith(("recpo_loss", *DECODERS))]


def test_a_loss_costs_three_operations_a_block_and_a_few_a_call(counts):
    losses = [row for row in counts if row["call"].startswith("recpo_loss")]
    assert len(losses) == 4
    for row in losses:
        blocks = row["launches"]["update_kernel"]  # one for each tile of tokens and block of words
        assert blocks == 3 and row["operations"] - 3 * blocks <= MOST_OF_A_LOSS, row["names"]
        assert row["waits"] == 0, row["names"]


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_table_of_the_rollout_guide(counts, decoder):
    a_layer, beside, waits = DECODERS[decoder]
    for layers in (2, 3):
        rows = [row for row in counts if row["call"] == f"{decoder} decoder, {layers} layers"]
        one, many = sorted(rows, key=lambda row: row["batch"])
        assert many["operations"] == layers * a_layer + beside, many["names"]
        assert one["operations"] == many["operations"] or decoder == "shared"
        assert one["waits"] == many["waits"] == waits and not many["launches"]
    guide = (BENCHMARK.parents[1] / "docs" / "guides" / "rollout.md").read_text()
    assert f'| `"{decoder}"` | {a_layer} | {beside} | {waits} |' in guide


def test_a_search_costs_the_same_for_any_batch_and_waits_for_nothing(rows):
    calls = {row["call"] for row in rows}
    assert {"item_topk", "item_topk, exclude", "ItemIndex(int8).search, exclude"} <= calls
    assert {"item_topk, include", "ItemIndex(int8).search, both lists"} <= calls
    for call in calls:
        one, many = (row for row in rows if row["call"] == call)
        assert one["operations"] == many["operations"] <= MOST, (call, one["names"], many["names"])
        assert one["waits"] == many["waits"] == 0, call


def test_hundreds_of_queries_cost_what_one_costs(dry, rows):
    """But for one launch from 65 queries on: what makes scores of products is then made ahead."""
    real = {(row["call"], row["batch"]): row["names"] for row in rows}
    calls = {row["call"] for row in dry}
    assert {f"ItemIndex({scan}).search, exclude" for scan in ("none", "bf16", "int8")} <= calls
    for call in calls:
        found = {row["batch"]: row for row in dry if row["call"] == call}
        assert tuple(found) == BATCHES
        assert found[1]["names"] == real[call, 1], call  # dry or not
        for batch, row in found.items():
            ahead = batch > 64 and row["names"].get("factors_kernel", 0)
            assert row["operations"] - ahead == found[1]["operations"], (call, batch, row["names"])
            assert row["operations"] <= MOST and row["waits"] == 0, (call, batch)


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
