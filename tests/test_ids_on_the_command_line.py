"""Ids on the command line are text as written; unknown settings of `prepare` are named."""

from __future__ import annotations

import json

import polars as pl
import pytest
import torch
from _support.toy import toy_model
from test_cli import error_line, run

from r2ec_fast.commands.recommend import recommend
from r2ec_fast.data import Catalog, IdMap, RecDataset, load_interactions, make_splits


@pytest.fixture
def taken(monkeypatch):
    """What `recommend` is called with."""
    calls = []
    from r2ec_fast import cli

    monkeypatch.setitem(cli.FUNCTIONS, "recommend", lambda **values: calls.append(values))

    def _taken(*arguments):
        # the parser is built from the real function's signature
        parser = cli.build_parser

        def built():
            cli.FUNCTIONS["recommend"] = recommend
            try:
                return parser()
            finally:
                cli.FUNCTIONS["recommend"] = lambda **values: calls.append(values)

        monkeypatch.setattr(cli, "build_parser", built)
        assert run("recommend", "--model", "m", *arguments) == 0
        monkeypatch.setattr(cli, "build_parser", parser)
        return calls[-1]

    return _taken


WRITTEN = [
    ("[42]", ["42"]),
    ("[007]", ["007"]),
    ("[0345337700]", ["0345337700"]),
    ("[1e5, 1_000, 0x1F, 1:30]", ["1e5", "1_000", "0x1F", "1:30"]),
    ("[null, ~, true, no, NaN, .inf]", ["null", "~", "true", "no", "NaN", ".inf"]),
    ("[2023-07-01, -1, +5, 1.0]", ["2023-07-01", "-1", "+5", "1.0"]),
    ('["a, b", 42]', ["a, b", "42"]),
    ("['it''s', \"say \\\"x\\\"\", 'a,b']", ["it's", 'say "x"', "a,b"]),
    ("[u1, u2]", ["u1", "u2"]),
    ("[@x, *y, a: b, &c, !d, %e, {f}]", ["@x", "*y", "a: b", "&c", "!d", "%e", "{f}"]),
    ("[ü, 😀 x , 中]", ["ü", "😀 x", "中"]),
    ("[a,]", ["a"]),
    ("u1", ["u1"]),
    ("42", ["42"]),
    ("0345337700", ["0345337700"]),
    ("null", ["null"]),
    ("B00: x", ["B00: x"]),
]


@pytest.mark.parametrize("text, ids", WRITTEN)
@pytest.mark.parametrize("option", ["users", "items"])
def test_taken_as_written(taken, option, text, ids):
    assert taken(f"--{option}", text)[option] == ids
    assert taken(f"--{option}={text}")[option] == ids


@pytest.mark.parametrize("text, ids", [w for w in WRITTEN if w[0][0] == "[" and "@x" not in w[0]])
def test_a_file_of_settings_too(taken, tmp_path, text, ids):
    file = tmp_path / "recommend.yaml"
    file.write_text(f"users: {text}\nk: 3\n", encoding="utf8")
    values = taken("--config", file)
    assert (values["users"], values["k"], values["items"]) == (ids, 3, None)


@pytest.mark.parametrize("text", ["[a, b", "[a,,b]", "[", "[,]"])
def test_what_is_no_list_is_refused_in_words(capsys, text):
    message = error_line(capsys, "recommend", "--model", "m", "--users", text)
    assert message.startswith("users: expected ") and "Parser key" not in message


def test_integer_ids_are_found_by_their_digits(tmp_path, capsys):
    rows = "".join(f"{u},{100 + (u + t) % 4},{t}\n" for u in (1, 42, 7) for t in range(3))
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + rows)
    text = load_interactions(tmp_path / "log.csv")
    catalog = Catalog(IdMap([int(i) for i in text.catalog.ids.ids]), text.catalog.fields)
    from dataclasses import replace

    data = replace(text, users=IdMap([int(u) for u in text.users.ids]), catalog=catalog)
    make_splits(data).save(tmp_path / "data")
    assert RecDataset.load(tmp_path / "data").data.users.ids == (1, 42, 7)
    model = toy_model(dtype=torch.float32).eval()
    model.set_items(model.encode_items(catalog))
    model.save_pretrained(tmp_path / "model", catalog)
    given = ["recommend", "--model", tmp_path / "model", "--reasoning", "false"]
    assert run(*given, "--data", tmp_path / "data", "--users", "[42, 7]") == 0
    assert "user 42" in capsys.readouterr().out
    assert run(*given, "--items", "[100, 103]") == 0
    message = error_line(capsys, *given, "--data", tmp_path / "data", "--users", "[042]")
    assert message.startswith("unknown id '042'")


@pytest.mark.parametrize("key", ["nonsense", "colums", "user_id"])
@pytest.mark.parametrize("source", ["generic", "movielens", "amazon", "check"])
def test_an_unknown_setting_of_prepare_is_named(capsys, tmp_path, source, key):
    file = tmp_path / "prepare.yaml"
    required = {"output_dir": "o", "path": "p"} if source != "check" else {"data": "d"}
    if source == "amazon":
        del required["path"]
    file.write_text(json.dumps(required | {key: 3}))
    message = error_line(capsys, "prepare", source, "--config", file)
    assert message.startswith(f"prepare {source}: unknown setting '{key}'; expected one of ")


def test_a_file_of_settings_of_prepare_works(capsys, tmp_path):
    (tmp_path / "log.csv").write_text("who,item_id\na,1\na,2\n")
    file = tmp_path / "prepare.yaml"
    out = tmp_path / "out"
    file.write_text(f"path: {tmp_path / 'log.csv'}\noutput_dir: {out}\ncolumns: {{user_id: who}}\n")
    assert run("prepare", "generic", "--config", file) == 0
    assert pl.read_parquet(out / "users.parquet")["user_id"].to_list() == ["a"]
