"""Diagnostics of a step, reasoning samples, and the HTML report of a run."""

import json
import re

import numpy as np
import pytest
from _support.training import lines, run, two

from r2ec_fast.cli import main
from r2ec_fast.report.html import write_report

RUN = {"log_completions_steps": 2, "log_entropy": True}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    run(out, **RUN)
    return out


def records(directory):
    log = (directory / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, log) if "reward" in r]


def test_a_step_says_how_it_went(finished):
    for record in records(finished):
        lengths = [record[f"completions/{n}_length"] for n in ("min", "mean", "max")]
        assert lengths == sorted(lengths)
        ranks = [record[f"rank/p{q}"] for q in (10, 50, 90)]
        assert ranks == sorted(ranks) and ranks[0] >= 1 and ranks[-1] <= 16
        assert 0 < record["entropy"] < np.log(400)
        assert record["perf/tokens_per_second"] > 0
        assert record["perf/peak_memory_mib"] > 50
        assert 0 <= record["clip_ratio/item_mean"] <= 1


def test_entropy_does_not_change_the_run(finished, tmp_path):
    run(tmp_path)
    without = [{k: v for k, v in r.items() if k != "entropy"} for r in lines(finished)]
    assert lines(tmp_path) == without
    assert not (tmp_path / "samples.jsonl").exists()


def test_samples_are_the_reasonings_of_one_user(finished):
    samples = [json.loads(s) for s in (finished / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [2, 2, 4, 4]
    assert len({s["prompt"] for s in samples[:2]}) == 1
    assert len({s["completion"] for s in samples}) > 1
    assert all("<answer>" in s["completion"] and s["target"] for s in samples)
    step = next(r for r in records(finished) if r["step"] == 2)
    assert min(s["rank"] for s in samples[:2]) >= 1
    assert max(s["reward"] for s in samples[:2]) <= 1
    assert step["reward"] > 0


def test_a_resumed_run_writes_its_samples_once(finished, tmp_path):
    run(tmp_path, **RUN, max_steps=3)
    run(tmp_path, **RUN, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "samples.jsonl").read_text() == (finished / "samples.jsonl").read_text()


def test_two_processes_count_all_completions(tmp_path):
    changes = {"max_steps": 1, "eval_steps": 0}
    run(tmp_path / "one", **changes, per_device_train_batch_size=8)
    two(tmp_path / "two", "recpo", changes)
    one, both = (records(tmp_path / name)[0] for name in ("one", "two"))
    for name in one:
        if name.startswith(("completions/", "rank/")):
            assert both[name] == pytest.approx(one[name]), name


def test_the_report_is_one_file_with_everything_in_it(finished, capsys):
    assert main(["report", str(finished)]) == 0
    page = (finished / "report.html").read_text()
    assert capsys.readouterr().out.strip().endswith("report.html")
    pictures = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,', page)
    assert {"reward", "rank of the target", "validation", "entropy (nats)"} <= set(pictures)
    assert "KL to the backbone" not in pictures  # nothing was logged for it
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert "Reasonings, newest first" in page and "learning_rate" in page


def test_text_of_a_model_cannot_break_the_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    names = ("target", "prompt", "completion", "finish_reason")
    sample = dict.fromkeys(names, "<script>x</script>")
    sample |= {"step": 1, "reward": 0.1, "rank": 3}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page = write_report(tmp_path).read_text()
    assert "<script" not in page and "&lt;script&gt;x" in page


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="no step was logged yet"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "last", ['{"step": 3, "rew', '{"step": 3, "reward": 0.', "{", "\x00\x00", "[3]"]
)
def test_a_cut_line_is_left_out_and_said(tmp_path, caplog, last):
    whole = '{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.7}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + last)
    sample = {"step": 1, "reward": 0.1, "rank": 3, "target": "t", "prompt": "p"}
    sample |= {"completion": "c", "finish_reason": "eos"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n" + last)
    assert main(["report", str(tmp_path)]) == 0
    assert "2 log lines, up to step 2" in (tmp_path / "report.html").read_text()
    said = [r.getMessage() for r in caplog.records]
    assert [x.split(":")[-1] for x in said] == [
        " line 3 is cut or broken; it is left out",
        " line 2 is cut or broken; it is left out",
    ]


def test_a_log_of_broken_lines_alone_is_refused(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "re\xff')
    assert main(["report", str(tmp_path)]) == 2
    assert "no step was logged yet" in capsys.readouterr().err
