"""The command line: help, configuration files, the way from a file to recommendations."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from _support.toy import toy_dataset, toy_model

from r2ec_fast.cli import build_parser, main, run_command
from r2ec_fast.config import RecPOConfig
from r2ec_fast.data import RecDataset
from r2ec_fast.prompts.builder import PromptConfig

COMMANDS = (
    "quickstart", "prepare", "reasonings", "train", "evaluate", "diagnose", "recommend", "index"
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with an interaction file, its data set and an exported model."""
    path = tmp_path_factory.mktemp("cli")
    data = toy_dataset()
    rows = ["user_id,item_id,timestamp,rating"]
    for user in range(data.data.num_users):
        for item, when in zip(data.history(user, 5).items, range(5), strict=True):
            rows.append(f"u{user},i{item},{1_600_000_000 + 86_400 * when + user},4.5")
    (path / "log.csv").write_text("\n".join(rows) + "\n")
    titles = [f"i{i},{title}" for i, title in enumerate(data.data.catalog.titles)]
    (path / "items.csv").write_text("item_id,title\n" + "\n".join(titles) + "\n")
    arguments = ["--path", path / "log.csv", "--items", path / "items.csv"]
    done = run("prepare", "generic", *arguments, "--output_dir", path / "data")
    assert done == 0
    catalog = RecDataset.load(path / "data").data.catalog
    model = toy_model(dtype=torch.float32).eval()
    model.set_items(model.encode_items(catalog))
    model.save_pretrained(path / "model", catalog)
    return path


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def error_line(capsys, *arguments) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().split("\n")
    assert len(lines) == 1 and captured.out == "", captured
    assert lines[0].startswith("r2ec-fast: error: ")
    return lines[0].removeprefix("r2ec-fast: error: ")


def help_text(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--help"])
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_names_every_command(capsys):
    text = help_text(capsys)
    assert all(f" {name} " in text for name in COMMANDS)


LEAVES = [
    ("quickstart",),
    *[("prepare", source) for source in ("generic", "movielens", "amazon", "check")],
    *[(name,) for name in ("reasonings", "train", "evaluate", "diagnose", "recommend", "index")],
]


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_help_explains_every_setting_and_its_default(path, capsys):
    with pytest.raises(SystemExit):
        main([*path, "--help"])
    settings = capsys.readouterr().out.split("options:", 1)[1]
    # a setting begins a line: its names, then (maybe on the next line) its explanation
    parts = re.split(r"\n  (?:-h, )?--", settings)[1:]
    assert len(parts) >= 3
    for part in parts:
        flat = " ".join(part.split())
        name, explained = flat.split()[0], re.split(r"\s{2,}", part, maxsplit=1)[1]
        assert re.search(r"[A-Za-z]{3,}", explained.split("(type:")[0].split("(required")[0]), part
        if name.endswith(".help"):  # of a setting with settings of its own
            continue
        if name not in ("help", "config", "print_config", "model", "model.prompts"):
            assert "default:" in flat or "required" in flat, part


def test_train_help_shows_every_field_of_the_configuration(capsys):
    text = help_text(capsys, "train")
    for field in dataclasses.fields(RecPOConfig):
        assert f"--{field.name} " in text
    for field in dataclasses.fields(PromptConfig):
        assert f"--model.prompts.{field.name} " in text
    assert "--learning_rate LEARNING_RATE Peak learning rate. (type: float, default: 1e-05)" in text


def test_a_file_then_overrides(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("data: d\nlearning_rate: 0.5\ntop_k: 7\nmodel: {prompts: {window: 3}}\n")
    settings = build_parser().parse_args(["train", "--config", str(file), "--top_k", "9"]).train
    assert (settings.learning_rate, settings.top_k, settings.model.prompts.window) == (0.5, 9, 3)
    assert settings.num_generations == RecPOConfig().num_generations


def test_prepare_shows_what_was_read(folder, capsys):
    arguments = ["--path", folder / "log.csv", "--items", folder / "items.csv"]
    assert run("prepare", "generic", *arguments, "--output_dir", folder / "again") == 0
    out = capsys.readouterr().out
    assert "source: log.csv" in out and f"wrote {folder / 'again'}" in out
    assert len(RecDataset.load(folder / "again").test) == 5


def test_evaluate_prints_baselines_and_both_modes(folder, capsys):
    output = folder / "metrics.json"
    arguments = ["--model", folder / "model", "--data", folder / "data"]
    assert run("evaluate", *arguments, "--max_completion_length", 4, "--output_file", output) == 0
    tables = [
        [line.split("|")[1].strip() for line in table.splitlines()]
        for table in capsys.readouterr().out.strip().split("\n\n")
    ]
    methods = ["popularity", "markov-1", "item-knn", "direct", "reasoned"]
    strata = ["history 1-4", "history 5-19", "history 20+"]
    targets = ["target in the head", "target in the tail", "cold target"]
    assert tables == [
        ["method", "---", *methods],
        ["method", "---", *methods],
        ["ndcg@10", "---", "all", *strata, *targets],
        ["baseline", "---", *methods[:3]],
        ["paired difference", "---", "reasoned - direct"],
    ]
    written = json.loads(output.read_text())
    assert written["direct"]["examples"] == 5
    assert 0 <= written["reasoned"]["ndcg@10"] <= 1
    gap = written["reasoned"]["ndcg@10"] - written["direct"]["ndcg@10"]
    assert written["reasoned - direct"]["ndcg@10"] == pytest.approx(gap, abs=1e-12)
    assert 0 < written["reasoned"]["coverage@10"] <= 1
    assert sum(written["direct"][f"{name}/examples"] for name in strata) == 5
    assert sum(written["direct"][f"{name}/examples"] for name in targets) == 5
    assert written["baselines"]["item-knn"]["settings"] == {"neighbours": 100}
    # without what lies beyond accuracy
    assert run("evaluate", *arguments, "--modes", "direct", "--beyond_accuracy", "false") == 0
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 2 and tables[1].startswith("| baseline |")


def test_evaluate_chooses_baselines_and_needs_no_model(folder, capsys, tmp_path):
    def methods(*arguments) -> list[str]:
        assert run("evaluate", "--data", folder / "data", *arguments) == 0
        table = capsys.readouterr().out.split("\n\n")[0].splitlines()[2:]
        return [line.split("|")[1].strip() for line in table]

    counting = ["popularity", "markov-1", "item-knn"]
    assert (
        methods() == methods("--baselines", "true") == methods("--baselines=counting") == counting
    )
    assert methods("--baselines", "item-knn,popularity") == ["item-knn", "popularity"]
    file = tmp_path / "evaluate.yaml"
    file.write_text("baselines: [markov-1]\nbaseline_settings: {}\n")
    assert methods("--config", file) == ["markov-1"]
    arguments = ["evaluate", "--data", folder / "data"]
    for none in ("none", "false"):
        message = error_line(capsys, *arguments, "--baselines", none)
        assert message == "model, baselines: expected a model or baselines, got neither"
    message = error_line(capsys, *arguments, "--baselines", "sasrek")
    assert message.startswith("baselines: expected counting, all, none, or any of popularity, ")
    message = error_line(capsys, *arguments, "--exclude_window", "true")
    assert message == "exclude_window: needs a model, which says how many events are shown"
    given = ["--baselines", "als", "--baseline_settings", "{als: {factor: 3}}"]
    message = error_line(capsys, *arguments, *given)
    assert message.startswith("baseline_settings: expected any of factors, regularization, ")


def test_a_filter_leaves_some_items_and_the_examples_that_fit(folder, capsys, tmp_path):
    wanted = "{title: {contains: lamp}}"
    arguments = ["--model", folder / "model", "--data", folder / "data", "--modes", "[direct]"]
    arguments += ["--ranks_file", tmp_path / "ranks.csv"]
    assert run("evaluate", *arguments, "--filter", wanted) == 0
    printed = capsys.readouterr().out
    items, fitting = (int(found) for found in re.findall(r"(\d+) of \d+", printed)[:2])
    header, *rows = (tmp_path / "ranks.csv").read_text().splitlines()
    assert 0 < items < 16 and len(rows) == fitting > 0
    names = header.split(",")
    for row in rows:
        cells = dict(zip(names, row.split(","), strict=True))
        assert all(1 <= int(cells[m]) <= items for m in ("popularity", "item-knn", "direct"))
    message = error_line(capsys, "evaluate", *arguments, "--filter", "{colour: red}")
    assert message.startswith("filter: the items have no column 'colour'")
    message = error_line(capsys, "evaluate", *arguments, "--filter", "{title: nothing}")
    assert message == "filter: 0 of 16 items fit, and no example's target"
    given = ["--model", folder / "model", "--items", "[i1]", "--reasoning", "false"]
    assert run("recommend", *given, "--k", 16, "--filter", wanted, "--include", "[i3, i1, i2]") == 0
    assert capsys.readouterr().out.lower().count("lamp") == 1


def test_diagnose_prints_a_table_and_what_is_wrong(folder, capsys):
    output = folder / "figures.json"
    arguments = ["diagnose", "--model", folder / "model", "--data", folder / "data"]
    arguments += ["--max_completion_length", 4, "--num_generations", 3]
    assert run(*arguments, "--output_file", output) == 0
    table, advice = capsys.readouterr().out.strip().split("\n\n")
    figures = json.loads(output.read_text())
    assert figures["examples"] == 5 and figures["num_generations"] == 3
    assert f"| tokens of a reasoning | {figures['mean_length']:.1f} |" in table
    gap, error = (figures[f"own_minus_swapped_ndcg@10{end}"] for end in ("", "/se"))
    assert f"| own - swapped reasoning, ndcg@10 | {gap:+.4f} ± {error:.4f} |" in table
    assert figures["clipped_ratio"] > 0.5  # random weights never write the marker in four tokens
    assert advice.startswith("RecPO has little to choose from: 100% of the reasonings are cut")
    message = error_line(capsys, *arguments, "--temperature", 0)
    assert message == "temperature: expected more than 0, got 0.0"
    # the same again, computed in other batches
    assert run(*arguments, "--batch_size", 2, "--output_file", folder / "again.json") == 0
    assert json.loads((folder / "again.json").read_text()) == pytest.approx(figures, rel=1e-5)


def test_evaluate_compares_the_examples_with_those_of_another_run(folder, capsys):
    ranks = folder / "ranks.csv"
    arguments = ["evaluate", "--model", folder / "model", "--data", folder / "data"]
    arguments += ["--modes", "[direct]"]
    assert run(*arguments, "--ranks_file", ranks) == 0
    header, *rows = ranks.read_text().splitlines()
    assert header == "user_id,position,item_id,popularity,markov-1,item-knn,direct"
    assert re.fullmatch(r"u\d+,\d+,i\d+(,\d+){4}", rows[0])
    worse = [row.rsplit(",", 1)[0] + ",9999" for row in rows]
    ranks.write_text("\n".join([header, *worse]) + "\n")
    capsys.readouterr()
    assert run(*arguments, "--compare_with", ranks, "--baselines", "false") == 0
    row = capsys.readouterr().out.strip().splitlines()[-1]
    assert row.startswith("| direct - before | +") and row.endswith(" | 5 |")
    message = error_line(capsys, *arguments, "--compare_with", folder / "none.csv")
    assert message == f"compare_with: no file {folder / 'none.csv'}"
    # said before the evaluation, whose result would be lost
    message = error_line(capsys, *arguments, "--ranks_file", ranks / "below.csv")
    assert f"ranks_file: cannot write to {ranks / 'below.csv'}" in message


def test_ranks_of_other_examples_are_not_compared(folder, capsys):
    ranks = folder / "three.csv"
    arguments = ["evaluate", "--model", folder / "model", "--data", folder / "data"]
    arguments += ["--modes", "[direct]"]
    assert run(*arguments, "--ranks_file", ranks, "--samples", 3) == 0
    capsys.readouterr()
    assert run(*arguments, "--compare_with", ranks) == 2
    message = "compare_with: expected ranks of the same 5 examples, got 3 that are not"
    assert message in capsys.readouterr().err


def test_evaluate_takes_a_sample_and_a_model_without_table(folder, capsys):
    toy_model(dtype=torch.float32).save_pretrained(folder / "bare")
    arguments = ["--model", folder / "bare", "--data", folder / "data"]
    arguments += ["--modes", "[direct]", "--samples", 3, "--beyond_accuracy", "false"]
    assert run("evaluate", *arguments, "--baselines", "none") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("| direct |") and last.endswith("| 3 |")


def test_recommend_prints_history_reasoning_and_items(folder, capsys):
    arguments = ["--model", folder / "model", "--max_completion_length", 4, "--k", 3]
    assert run("recommend", *arguments, "--data", folder / "data", "--users", "[u0, u1]") == 0
    out = capsys.readouterr().out
    assert out.count("history: ") == out.count("reasoning: ") == 2
    assert "user u0" in out and "user u1" in out and out.count("│    3 │") == 2
    arguments = ["--model", folder / "model", "--items", "[red mug, i2]"]
    assert run("recommend", *arguments, "--reasoning", "false") == 0
    out = capsys.readouterr().out
    assert "history: red mug | red bowl" in out and "reasoning: " not in out


def test_index_makes_a_bare_model_a_recommender(folder, capsys):
    toy_model(dtype=torch.float32).save_pretrained(folder / "bare2")
    arguments = ["--model", folder / "bare2", "--items", "[i1]", "--reasoning", "false"]
    assert "holds no catalog.parquet" in error_line(capsys, "recommend", *arguments)
    assert run("index", "--model", folder / "bare2", "--data", folder / "data") == 0
    assert "encoded 16 items" in capsys.readouterr().out
    assert run("recommend", *arguments) == 0


def test_reasonings_are_written_then_learned(folder, capsys):
    toy_model(dtype=torch.float32).save_pretrained(folder / "bare4")
    file, written = folder / "sft.yaml", folder / "reasonings.jsonl"
    file.write_text(
        "objective: reasoning_sft\nuse_lora: false\nmax_steps: 1\nmax_completion_length: 40\n"
        f"model: {{name_or_path: {folder / 'bare4'}}}\noutput_dir: {folder / 'sft'}\n"
        "reasonings:\n"
        "  templates: ['After {last.colour}: {target.colour}']\n"
        "  attributes: {colour: {column: title, pattern: '^[a-z]+'}}\n"
    )
    settings = ["--config", file, "--data", folder / "data"]
    assert run("reasonings", *settings, "--output_file", written) == 0
    out = capsys.readouterr().out.splitlines()
    dataset = RecDataset.load(folder / "data")
    number = len(dataset.train)
    assert out[-1] == f"wrote {number} reasonings to {written}"
    assert len(out) == 6 and re.fullmatch("After [a-z]+: [a-z]+", out[0])
    rows = written.read_text().splitlines()
    assert len(rows) == number and json.loads(rows[0])["text"] == out[0]
    # settings of the command line go before those of the file
    more = ["--reasonings.templates", "['{target.colour}!']", "--output_file", folder / "2.jsonl"]
    assert run("reasonings", *settings, *more) == 0
    assert re.fullmatch(
        "[a-z]+!", json.loads((folder / "2.jsonl").read_text().split("\n")[0])["text"]
    )
    assert run("train", *settings, "--reasonings", written) == 0
    assert (
        json.loads((folder / "sft" / "metrics.jsonl").read_text().split("\n")[0])["token_loss"] > 0
    )
    # a file cannot be made of a file, nor where nothing can be written
    capsys.readouterr()
    given = ["--reasonings", written, "--output_file", folder / "3.jsonl"]
    assert "expected templates, got" in error_line(capsys, "reasonings", *settings, *given)
    message = error_line(capsys, "reasonings", *settings, "--output_file", written / "x")
    assert f"output_file: cannot write to {written / 'x'}" in message


def test_train_then_recommend(folder, capsys):
    file = folder / "train.yaml"
    file.write_text(
        f"data: {folder / 'data'}\noutput_dir: {folder / 'run'}\nuse_lora: false\n"
        "objective: contrastive\nper_device_train_batch_size: 4\n"
        f"model: {{name_or_path: {folder / 'bare3'}}}\n"
    )
    model = toy_model(dtype=torch.float32)
    model.save_pretrained(folder / "bare3")
    assert run("train", "--config", file, "--max_steps", 2) == 0
    assert "eval_valid_ndcg@10: " in capsys.readouterr().out
    trained = folder / "run" / "model"
    assert run("recommend", "--model", trained, "--items", "[i1]", "--reasoning", "false") == 0


def test_errors_are_one_line_unless_asked_for(folder, capsys, monkeypatch):
    arguments = ["evaluate", "--model", folder / "model", "--data", folder / "none"]
    assert "no dataset here" in error_line(capsys, *arguments)
    monkeypatch.setenv("R2EC_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        run(*arguments)


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "r2ec_fast", "recommend", "--model", "m"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    expected = "r2ec-fast: error: users, items: give user ids or a list of items\n"
    assert done.stderr == expected


def test_a_table_of_another_size_is_refused(folder, capsys):
    data = toy_dataset()
    model = toy_model(dtype=torch.float32)
    model.set_items(model.encode_items(data.data.catalog)[:9])
    model.save_pretrained(folder / "nine", data.data.catalog)
    arguments = ["--model", folder / "nine", "--data", folder / "data"]
    assert "expected the 9 items of the model's item table, got 16" in error_line(
        capsys, "evaluate", *arguments
    )


def test_run_command_raises():
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        run_command(["recommend", "--model", "m", "--items", "[a]", "--k", "0"])


@pytest.mark.parametrize("target", ["own", "other"])
def test_index_keeps_what_else_is_in_the_directory(folder, tmp_path, target):
    clone = tmp_path / "clone"
    toy_model(dtype=torch.float32).save_pretrained(clone)
    place = clone if target == "own" else tmp_path / "place"
    for name in ("README.md", "LICENSE", "weights.gguf", ".git/config", "photos/cat.png"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("a user's")
    weights = (clone / "model.safetensors").read_bytes()
    output = [] if target == "own" else ["--output_dir", place]
    assert run("index", "--model", clone, "--data", folder / "data", *output) == 0
    for name in ("README.md", "LICENSE", "weights.gguf", ".git/config", "photos/cat.png"):
        assert (place / name).read_text() == "a user's"
    assert (place / "item_index.safetensors").is_file()
    assert (clone / "model.safetensors").read_bytes() == weights


def test_index_refuses_a_file(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("a user's")
    line = error_line(
        capsys,
        *("index", "--model", folder / "model", "--data", folder / "data"),
        *("--output_dir", tmp_path / "file"),
    )
    assert "output_dir: cannot write to " in line and "it is a file" in line
    assert (tmp_path / "file").read_text() == "a user's"


def test_evaluate_refuses_the_table_of_another_catalog(folder, tmp_path, capsys):
    for name in ("log.csv", "items.csv"):
        text = (folder / name).read_text()
        (tmp_path / name).write_text(re.sub(r"\bi3,", "a3,", text))
    arguments = ["--path", tmp_path / "log.csv", "--items", tmp_path / "items.csv"]
    assert run("prepare", "generic", *arguments, "--output_dir", tmp_path / "data") == 0
    line = error_line(capsys, "evaluate", "--model", folder / "model", "--data", tmp_path / "data")
    assert line.startswith("data: its items are not those of the model's item table")
    assert "in the table and 'a3' here" in line
