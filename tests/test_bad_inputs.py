"""Twelve mistakes users make, and what each is told."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from _support.toy import toy_dataset, toy_model
from test_cli import error_line, run

from r2ec_fast.data import History, load_interactions
from r2ec_fast.packing.packer import pack_histories
from r2ec_fast.prompts.builder import PromptBuilder
from r2ec_kernels import ItemIndex, grouped_advantage, item_topk, recpo_loss

LOG = "user_id,item_id,timestamp\nu1,a,1\nu1,b,2\nu2,b,3\nu2,a,4\n"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = toy_model(dtype=torch.float32).eval()
    catalog = toy_dataset().data.catalog
    model.set_items(model.encode_items(catalog))
    model.save_pretrained(path, catalog)
    return path


def prepare(capsys, tmp_path, text: str, *more) -> str:
    file = tmp_path / "log.csv"
    file.write_text(text)
    arguments = ["--path", file, "--output_dir", tmp_path / "data", *more]
    return error_line(capsys, "prepare", "generic", *arguments)


def test_1_missing_column(capsys, tmp_path):
    message = prepare(capsys, tmp_path, LOG.replace("item_id", "product"))
    assert "item_id" in message and "product" in message and "columns" in message


def test_2_empty_file(capsys, tmp_path):
    message = prepare(capsys, tmp_path, "")
    assert message == f"path: {tmp_path / 'log.csv'} is empty"


def test_3_unknown_item(capsys, model_dir):
    message = error_line(capsys, "recommend", "--model", model_dir, "--items", "[red mug, sofa]")
    assert message == "unknown item 'sofa': neither an item id nor a title"


def test_4_negative_k(capsys, model_dir):
    arguments = ["--model", model_dir, "--items", "[i1]", "--k", "-3"]
    assert error_line(capsys, "recommend", *arguments) == "k: expected at least 1, got -3"
    with pytest.raises(ValueError, match="k: expected at least 0, got -3"):
        item_topk(torch.ones(1, 4), torch.ones(5, 4), -3)


def test_5_nan_rows_in_a_table():
    table = torch.ones(6, 4)
    table[3, 1] = float("nan")
    with pytest.raises(ValueError, match="items: expected finite values, row 3 holds NaN"):
        ItemIndex(table)


def test_6_wrong_dtype():
    with pytest.raises(TypeError, match="queries: expected float32.*got torch.int64"):
        item_topk(torch.ones(1, 4, dtype=torch.int64), torch.ones(5, 4), 2)
    with pytest.raises((TypeError, ValueError), match="int64|integer"):
        pack_histories([[1.5, 2.5]], max_tokens=8)


def test_7_history_longer_than_the_window():
    data = toy_dataset()
    builder = PromptBuilder(toy_model().tokenizer, data.data.catalog, toy_model().prompts)
    items = np.arange(16)
    long, short = builder.user_ids(History(items)), builder.user_ids(History(items[-3:]))
    assert long == short  # the newest events are shown; nothing fails, nothing else is cut


def test_8_item_without_title(capsys, tmp_path):
    table = tmp_path / "items.csv"
    table.write_text("item_id,title\na,\nb,Bowl\n")
    message = prepare(capsys, tmp_path, LOG, "--items", table, "--missing_text", "refuse")
    assert "title" in message and "'a'" in message
    (tmp_path / "log.csv").write_text(LOG)
    report = load_interactions(tmp_path / "log.csv", items=table, min_user_events=1).report
    assert "title" in report.to_text() and "dropped" in report.to_text()


def test_9_unreadable_model_path(capsys, tmp_path):
    toy_dataset().save(tmp_path / "data")
    arguments = ["--model", tmp_path / "nowhere", "--data", tmp_path / "data"]
    message = error_line(capsys, "evaluate", *arguments)
    assert message.startswith(f"model: cannot load '{tmp_path / 'nowhere'}': ")
    assert "no model directory at" in error_line(
        capsys, "recommend", "--model", tmp_path / "nowhere", "--items", "[a]"
    )


def test_10_output_directory_that_cannot_be_written(capsys, tmp_path, model_dir):
    toy_dataset().save(tmp_path / "data")
    (tmp_path / "file").write_text("")
    places = [tmp_path / "file" / "run"]
    if os.geteuid() != 0:  # root may write everywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        places.append(tmp_path / "locked" / "run")
    for place in places:
        arguments = ["--data", tmp_path / "data", "--model.name_or_path", model_dir]
        message = error_line(capsys, "train", *arguments, "--output_dir", place)
        assert f"output_dir: cannot write to {place}" in message
        (tmp_path / "log.csv").write_text(LOG)
        message = error_line(
            capsys, "prepare", "generic", "--path", tmp_path / "log.csv", "--output_dir", place
        )
        assert str(place) in message


def test_11_unknown_configuration_key(capsys, tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("data: d\nlearning_rte: 0.1\n")
    assert "learning_rte" in error_line(capsys, "train", "--config", file)
    assert "--learning_rte" in error_line(capsys, "train", "--data", "d", "--learning_rte", "0.1")
    message = error_line(capsys, "train", "--data", "d", "--learning_rate", "fast")
    assert "learning_rate" in message and "fast" in message
    message = error_line(capsys, "train", "--data", "d", "--objective", "dpo")
    assert message == "objective: expected one of recpo, contrastive, reasoning_sft, got 'dpo'"


def test_12_rewards_with_the_wrong_group_size():
    hidden, weight = torch.ones(5, 4), torch.ones(7, 4)
    ids = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"user_states: expected one row per trajectory, 6 for"):
        recpo_loss(
            hidden,
            weight,
            ids,
            ids,
            torch.ones(2, 3),
            torch.ones(8, 4),
            torch.ones(2, 4),
            torch.arange(2),
        )
    with pytest.raises(ValueError, match=r"rewards: expected"):
        grouped_advantage(torch.ones(8))


def test_run_reports_success(capsys, tmp_path):
    (tmp_path / "log.csv").write_text(LOG)
    arguments = ["--path", tmp_path / "log.csv", "--output_dir", tmp_path / "data"]
    assert run("prepare", "generic", *arguments) == 0
