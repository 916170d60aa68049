# ruff: noqa: E402  the benchmarks are scripts, found after their folder is on the path
"""The benchmarks: gates that catch, comparisons that notice, beam searches that agree."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import beam_search
import end_to_end
import harness
import table
import workload
from beam_search import SharedBeams, Title, Trie, title_log_probs, transformers_beams
from harness import Case, Entry, Row, Settings, Wrong, measure
from sasrec import SASRec

TINY = {"device": "cpu", "items": 60, "users": 3, "prompt_tokens": 280}


def entry_of(*cases: Case, versus: str = "") -> Entry:
    methods = tuple(case.method for case in cases)
    return Entry("toy", "op", {"N": 4}, methods, lambda: cases, versus=versus)


def right(_: object) -> float:
    return 0.0


# ---- the harness ---------------------------------------------------------------------------------


def test_a_wrong_result_has_a_row_and_no_time():
    def check(result: float) -> float:
        return harness.require(abs(result - 2.0), 1e-6, "sum")

    entry = entry_of(
        Case("good", lambda: 2.0, check), Case("bad", lambda: 2.1, check), versus="good"
    )
    good, bad = measure(entry, Settings(repeats=3))
    assert (good.status, good.n, good.ratio) == ("ok", 3, 1.0)
    assert bad.status == "WRONG" and "sum: error 0.1" in bad.note
    assert bad.median_ms is None and bad.ratio is None and bad.n == 0
    assert "WRONG" in table.render([good, bad])


def test_nan_is_wrong():
    with pytest.raises(Wrong, match="nan"):
        harness.require(float("nan"), 1.0, "loss")


def test_failures_and_missing_peers_are_rows_and_the_table_goes_on():
    def fail(error: Exception):
        def run() -> None:
            raise error

        return run

    rows = measure(
        entry_of(
            Case("broken", fail(RuntimeError("no such kernel")), right),
            Case("absent", fail(ModuleNotFoundError("No module named 'peer'")), right),
            Case("large", fail(torch.OutOfMemoryError("tried to allocate")), right),
            Case("fine", lambda: 1, right),
        ),
        Settings(repeats=2),
    )
    assert [row.status for row in rows] == ["failed", "not installed", "failed", "ok"]
    assert "no such kernel" in rows[0].note and rows[2].note == "out of memory"


def test_what_a_server_makes_once_is_no_part_of_a_time():
    made: list[int] = []

    def run() -> int:
        assert made == [1]
        return 1

    def start() -> None:
        made.append(1)
        time.sleep(0.3)

    def missing() -> None:
        raise ModuleNotFoundError("No module named 'server'")

    rows = measure(
        entry_of(
            Case("served", run, right, prepare=start),
            Case("absent", run, right, prepare=missing),
        ),
        Settings(repeats=2),
    )
    assert [row.status for row in rows] == ["ok", "not installed"]
    assert rows[0].median_ms < 200


def test_an_entry_that_cannot_be_built_is_a_row_a_method():
    def build():
        raise ValueError("bad shape")

    rows = measure(Entry("toy", "op", {}, ("a", "b"), build), Settings())
    assert [(r.method, r.status) for r in rows] == [("a", "failed"), ("b", "failed")]


def test_cases_take_turns_and_the_rare_ones_are_spread(monkeypatch):
    counts = iter([12, 3])
    monkeypatch.setattr(harness, "_repeats", lambda first, settings: next(counts))
    order: list[str] = []
    short = Case("short", lambda: order.append("s"), right)
    long = Case("long", lambda: order.append("L"), right)
    rows = measure(entry_of(short, long), Settings())
    assert [row.n for row in rows] == [12, 3]
    assert "".join(order).endswith("ssssL" * 3)


def test_a_call_that_would_not_fit_the_budget_is_skipped_before_it_runs():
    calls: list[int] = []

    def case(size: int) -> Case:
        return Case("slow", lambda: calls.append(size), right, cost=("slow", size))

    settings = Settings(repeats=1, deadline=time.monotonic() + 5)
    measure(entry_of(case(1)), settings)
    settings.costs["slow"] = 10.0  # seconds a unit, as an earlier entry may have found
    [row] = measure(entry_of(case(8)), settings)
    assert row.status == "skipped" and "up to 80 s" in row.note and 8 not in calls


@pytest.mark.parametrize("size, runs", [(20, True), (50, False)])
def test_a_call_that_would_leave_too_little_for_other_rows_is_skipped(size, runs):
    calls: list[int] = []
    case = Case("slow", lambda: calls.append(size), right, cost=("slow", size))
    settings = Settings(repeats=1, deadline=time.monotonic() + 100)
    settings.costs["slow"] = 1.0
    measure(entry_of(case), settings)
    assert bool(calls) == runs


def test_after_the_deadline_rows_say_that_there_was_no_time():
    [row] = measure(entry_of(Case("a", lambda: 1, right)), Settings(deadline=time.monotonic()))
    assert row.status == "skipped" and row.median_ms is None


@pytest.mark.parametrize(
    ("times", "share", "value"),
    [([3, 1, 2], 0.2, 1), ([3, 1, 2], 0.8, 3), (range(1, 101), 0.9, 90), (range(1, 101), 0.99, 99)],
)
def test_percentiles_are_nearest_ranks(times, share, value):
    assert harness.percentile(list(times), share) == value


def test_statistics_of_a_row():
    case = Case("a", lambda: 0, right, moved=2e9, flops=1e9, work=10, unit="users")
    row = Row("s", "op", {"B": 1}, "a")
    harness.fill(row, case, [1.0, 2.0, 3.0, 2.0, 2.0], None)
    assert (row.median_ms, row.p20_ms, row.p80_ms, row.n) == (2000, 1000, 2000, 5)
    assert (row.per_s, row.gb_s, row.tflop_s) == (5.0, 1.0, 0.0005)
    assert row.noisy
    harness.fill(row, case, [2.0, 2.05, 2.1], None)
    assert not row.noisy
    row.rate = 0.85  # the machine slowed down under steady repeats
    assert row.noisy and "machine at 0.85 of its rate" in table.render([row])
    row.rate = 1.05
    assert not row.noisy
    harness.fill(row, case, [2.0, 2.5], None)
    assert row.noisy


def test_rotating_inputs_begin_with_the_checked_one():
    run = harness.rotating(lambda x: x, [1, 2, 3])
    assert [run() for _ in range(5)] == [1, 2, 3, 1, 2]


def test_a_row_reads_back_from_csv(tmp_path):
    rows = [
        Row("s", "op", {"B": 1, "N": 10}, "a, b", median_ms=1.5, n=3, stages={"head": 0.5},
            p20_ms=1.4, p80_ms=1.9),
        Row("s", "op", {"B": 1, "N": 10}, "c", status="WRONG", note="off by 3"),
    ]  # fmt: skip
    table.write_csv(tmp_path / "rows.csv", rows)
    with (tmp_path / "rows.csv").open() as file:
        read = list(csv.DictReader(file))
    assert read[0]["method"] == "a, b" and float(read[0]["median_ms"]) == 1.5
    assert json.loads(read[0]["shape"]) == {"B": 1, "N": 10} and read[0]["noisy"] == "True"
    assert read[1]["status"] == "WRONG" and read[1]["median_ms"] == ""
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.csv"]


def test_ratios_alone_where_the_machine_is_shared():
    row = Row("s", "op", {"B": 1}, "a", median_ms=123.0, p20_ms=1.0, p80_ms=2.0, ratio=3.0,
              versus="b", stages={"head": 77.0}, n=3)  # fmt: skip
    text = table.render([row], ratios_only=True)
    assert "3.00 vs b" in text and "123" not in text and "77" not in text


def test_series_differ_in_one_size_alone():
    def row(n: int, b: int) -> Row:
        return Row("s", "op", {"N": n, "B": b}, "m", median_ms=1.0)

    rows = [row(n, b) for n in (30, 10, 20) for b in (1, 2)]
    found = table.series(rows, "N")
    assert [[r.shape["N"] for r in group] for group in found.values()] == [[10, 20, 30]] * 2
    assert not table.series(rows, "B")  # two points are no line
    peer = [Row("s", "op", {"N": n, "B": 1}, "peer", median_ms=1.0) for n in (10, 20)]
    found = table.series([*rows, *peer], "N")  # beside one of three they stay
    assert [len(group) for key, group in found.items() if key[3] == "peer"] == [2]


def test_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        Row("s", "op", {"N": n, "B": 1}, m, median_ms=n / 10, p20_ms=n / 11, p80_ms=n / 9,
            peak_mib=1.0)
        for n in (10, 100, 1000) for m in ("a", "b")
    ]  # fmt: skip
    [path] = table.plot(rows, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


# ---- beam search ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work() -> workload.Workload:
    made = workload.make_workload(None, "toy", dtype=torch.float32, **TINY)
    with torch.no_grad():  # wider weights: its titles differ
        for parameter in made.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    made.model.set_items(workload.draw_items(made))
    return made


def prompts_of(work: workload.Workload) -> list[list[int]]:
    return [work.builder.user_ids(user) for user in work.users]


@pytest.mark.parametrize("search", ["shared", "transformers"])
def test_beams_as_many_as_titles_find_what_enumeration_finds(work, search):
    trie, prompts = Trie(work.titles, work.eos), prompts_of(work)
    model = work.model.language_model
    beams = 3 * len(work.titles)
    if search == "shared":
        with SharedBeams(model, trie, beams=beams) as searcher:
            found = searcher.search(prompts)
    else:
        found = transformers_beams(model, prompts, trie, beams=beams)
    for prompt, titles in zip(prompts, found, strict=True):
        every = title_log_probs(model, prompt, work.titles, work.eos)
        order = sorted(range(len(every)), key=lambda i: -every[i])
        assert [title.item for title in titles] == order
        torch.testing.assert_close(
            torch.tensor([title.score for title in titles]),
            torch.tensor([every[i] for i in order]),
            rtol=1e-4,
            atol=1e-3,
        )


@pytest.mark.parametrize("beams", [2, 5, 20])
def test_both_searches_prune_alike(work, beams):
    trie, prompts = Trie(work.titles, work.eos), prompts_of(work)
    model = work.model.language_model
    with SharedBeams(model, trie, beams=beams) as searcher:
        ours = searcher.search(prompts)
    theirs = transformers_beams(model, prompts, trie, beams=beams)
    for a, b in zip(ours, theirs, strict=True):
        assert len(a) == beams
        end_to_end.same_titles(a, b, 1e-4, "ours against transformers")


def test_our_beams_leave_the_model_as_it_was(work):
    model = work.model.language_model
    with SharedBeams(model, Trie(work.titles, work.eos), beams=4) as searcher:
        searcher.search(prompts_of(work))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_title_may_begin_another_and_equal_titles_are_one():
    trie = Trie([[5, 6], [5], [5, 6, 7], [5, 6]], eos=9)
    ends = {tuple(t): int(trie.item[trie.walk(t)]) for t in ([5], [5, 6], [5, 6, 7])}
    assert ends == {(5,): 1, (5, 6): 0, (5, 6, 7): 2}
    assert trie.walk([6]) == -1 and trie.longest == 3
    allowed = beam_search.allowed_tokens(trie, 2)
    assert sorted(allowed(0, torch.tensor([1, 1, 5]))) == [6, 9]
    assert allowed(0, torch.tensor([1, 1, 8])) == [9]  # a dead beam
    with pytest.raises(ValueError, match=r"titles\[1\]"):
        Trie([[1], [2, 9]], eos=9)


def test_lists_of_titles_differ_only_in_near_ties():
    right_list = [Title(1, -1.0), Title(2, -2.0), Title(3, -3.0)]
    swapped = [Title(2, -1.0), Title(1, -2.0), Title(3, -3.0)]
    end_to_end.same_titles(swapped, right_list, 1e-3, "order is by score")
    end_to_end.same_titles([*right_list[:2], Title(4, -3.0001)], right_list, 1e-3, "a tie")
    for wrong in (
        right_list[:2],
        [Title(1, -1.0), Title(2, -2.1), Title(3, -3.0)],
        [Title(1, -1.0), Title(9, -2.0), Title(3, -3.0)],
    ):
        with pytest.raises(Wrong):
            end_to_end.same_titles(wrong, right_list, 1e-3, "x")


def test_lists_of_titles_may_share_most_in_16_bits():
    right_list = [Title(item, -float(item)) for item in range(10)]
    end_to_end.mostly_same_titles([*right_list[2:], Title(30, -9.0)], right_list, 0.2, "two strays")
    with pytest.raises(Wrong, match="7 titles in common of 10"):
        end_to_end.mostly_same_titles(right_list[3:], right_list, 0.2, "three")


# ---- end to end ----------------------------------------------------------------------------------


def measured(work: workload.Workload, batch: int = 2) -> dict[str, Row]:
    bench = end_to_end.Bench(work, beams=5)
    [entry] = end_to_end.entries(lambda: bench, label="toy", batches=(batch,), reasoning=(3, 34))
    return {row.method: row for row in measure(entry, Settings(repeats=1))}


@pytest.mark.slow  # the smoke suite does the same
def test_every_method_passes_its_gate_and_times_its_stages(work):
    rows = measured(work)
    vllm = rows.pop("vLLM, 3 tokens")
    assert vllm.status in ("not installed", "skipped")
    assert {row.status for row in rows.values()} == {"ok"}, table.render(list(rows.values()))
    assert set(rows["R2ec direct"].stages) == {"assembly", "prefill", "head", "ids"}
    wanted = {"assembly", "prefill", "decode", "read-out", "head", "ids"}
    assert set(rows["R2ec reasoned, 34 tokens"].stages) == wanted
    for row in rows.values():
        assert sum(row.stages.values()) <= 1.01 * row.median_ms + 1.0
        assert row.unit == "users" and row.per_s == pytest.approx(2e3 / row.median_ms)


def test_a_head_that_returns_other_items_is_caught(work, monkeypatch):
    top_items = type(work.model).top_items

    def shifted(self, states, k, exclude=None):
        best = top_items(self, states, k + 1, exclude=exclude)
        return type(best)(best.scores[:, 1:], best.indices[:, 1:])

    monkeypatch.setattr(type(work.model), "top_items", shifted)
    rows = measured(work)
    assert rows["R2ec direct"].status == "WRONG"
    assert rows["R2ec direct"].median_ms is None
    assert rows["R2ec reasoned, 3 tokens"].status == "WRONG"
    assert rows["SASRec + item head"].status == "ok"


def test_states_that_are_off_are_caught(work, monkeypatch):
    encode = type(work.model).encode_rows
    monkeypatch.setattr(
        type(work.model), "encode_rows", lambda *args, **more: encode(*args, **more) * 1.01
    )
    assert "state of user 0" in measured(work)["R2ec direct"].note


def test_a_reasoning_that_is_not_greedy_is_caught(work, monkeypatch):
    from r2ec_fast.rollout import stepwise

    sample = stepwise.sample_tokens

    def other(logits, *arguments):
        return sample(-logits, *arguments)

    monkeypatch.setattr(stepwise, "sample_tokens", other)
    rows = measured(work)
    assert "greedy tokens" in rows["R2ec reasoned, 3 tokens"].note
    assert rows["R2ec direct"].status == "ok"


def test_a_beam_search_with_wrong_caches_is_caught(work, monkeypatch):
    reorder = SharedBeams._reorder
    mirrored = staticmethod(lambda decoder, slots: reorder(decoder, slots.flip(0)))
    monkeypatch.setattr(SharedBeams, "_reorder", mirrored)
    rows = measured(work)
    assert rows["20 beams, shared prefill"].status == "WRONG"
    assert rows["20 beams, transformers"].status == "ok"


def test_the_stages_are_what_the_recommender_does():
    toy = pytest.importorskip("toy")
    from r2ec_fast import Recommender

    dataset, model = toy.toy_dataset(), toy.toy_model(dtype=torch.float32)
    catalog = dataset.data.catalog
    recommender = Recommender(model, catalog, data=dataset)
    histories = [dataset.history(user, 3, 3) for user in range(4)]
    plain = workload.Catalog(catalog.titles, list(catalog.ids.ids))
    users = [workload.Events(h.items, h.timestamps, h.ratings, h.target_time) for h in histories]
    work = workload.Workload(
        model, model.prompt_builder(plain), plain, [[5]], users, "toy", None, 3
    )
    served = end_to_end.direct(end_to_end.Bench(work), 4, harness.Stages("cpu"))
    expected = recommender.recommend(histories, end_to_end.K, reasoning=False)
    assert served.recommended == [[(r.item_id, r.title) for r in user] for user in expected]


def test_sasrec_ignores_padding_and_the_future():
    model = SASRec(30).double().eval()
    histories = [torch.arange(n).numpy() % 30 for n in (3, 7, 60)]
    together = model(model.rows(histories))
    for history, state in zip(histories, together, strict=True):
        alone = model(model.rows([history]))[0]
        torch.testing.assert_close(state, alone)
    rows = model.rows(histories[1:2])
    changed = rows.clone()
    changed[0, 0] = 25
    assert not torch.equal(model(rows), model(changed))
    assert model.rows([histories[2]]).shape == (1, 50)


def test_workload_titles_and_prompts_keep_their_limits(work):
    assert len(set(work.catalog.titles)) == len(work.catalog.titles) == 60
    assert all(0 < len(title) <= workload.MAX_TITLE for title in work.titles)
    lengths = [len(prompt) for prompt in prompts_of(work)]
    assert max(lengths) <= 280 and min(lengths) > 200
    assert "random weights" in work.describe()


@pytest.mark.parametrize("calls", [1, 3])
def test_measuring_memory_writes_nothing_on_the_terminal(calls):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import torch
import machine
for _ in range({calls}):
    assert machine.torch_peak_mib(lambda: torch.ones(1 << 18) + 1) >= 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done
