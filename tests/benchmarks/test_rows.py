# ruff: noqa: E402  the benchmarks are scripts, found after their folder is on the path
"""Rows: what they hold, what they refuse, and the file that they are kept in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import kernel_checks
from harness import Case, Entry, Settings, Wrong, measure
from kernel_data import Head, HeadShape, require_equal
from record import Record
from rows import Row


def test_a_check_alone_has_no_time_and_a_remark_may_fail():
    def right(_: object) -> float:
        return 0.0

    def fail() -> str:
        raise RuntimeError("no profiler")

    cases = [
        Case("checked", lambda: 1, right, timed=False, remark=lambda: "by int8"),
        Case("timed", lambda: 1, right, remark=fail),
    ]
    entry = Entry("toy", "op", {}, ("checked", "timed"), lambda: cases)
    checked, timed = measure(entry, Settings(repeats=2))
    assert (checked.status, checked.n, checked.median_ms) == ("ok", 0, None)
    assert checked.note == "checked, no timing; by int8"
    assert (timed.status, timed.n) == ("ok", 2) and "no profiler" in timed.note


def test_a_cut_line_is_a_row_that_is_not_done(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [Row("s", "op", {"N": n}, "m") for n in range(3)]
    record = Record(path, {"commit": "a"})
    record.add(rows)
    record.close()
    path.write_bytes(path.read_bytes()[:-20])
    again = Record(path, {"commit": "a"})
    assert list(again.done) == [row.key for row in rows[:2]]
    again.add(rows[2:])
    again.close()
    assert list(Record(path, {"commit": "a"}).done) == [row.key for row in rows]


def test_a_file_of_another_commit_or_another_kind_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    record = Record(path, {"commit": "a"})
    record.add([Row("s", "op", {}, "m")])
    record.close()
    with pytest.raises(ValueError, match="commit 'a', this run is of 'b'"):
        Record(path, {"commit": "b"})
    path.write_text("a table\n")
    with pytest.raises(ValueError, match="not a file of rows"):
        Record(path, {"commit": "a"})


def test_a_wrong_kernel_is_told_with_its_shape_or_its_output():
    """Planted: another best item, and a log-probability off by a tenth."""
    data = kernel_checks._Tables("cpu", True, torch.float32)

    def run(queries, items, excluded, targets, last=0) -> tuple:
        scores = (queries @ items.T).sort(1, descending=True)
        return scores.values[:, last : last + 2], scores.indices[:, last : last + 2]

    case = data.case(run, lambda *part: run(*part, last=len(part[0]) // 5), require_equal)
    with pytest.raises(Wrong, match="^B=5 d=72: other items than float64 scores give"):
        case.check(case.run())
    head = Head("cpu", HeadShape(8, 50, 24, torch.float32))
    found = head.run_plain()
    assert head.check(found) < 1e-6
    with pytest.raises(Wrong, match="^log-probability: error 0.1, allowed"):
        head.check((found[0] + 0.1, found[1]))
