"""Settings of a run: their ranges, and old names in every place where settings are given."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import yaml
from _support.training import RUN, lines, run, same

from r2ec_fast import cli
from r2ec_fast.config import REDUCTIONS, RENAMED, RecPOConfig
from r2ec_fast.utils import settings

# old name, its value, new name, its value
OLD = [
    ("kl_weight", 0.25, "beta", 0.25),
    ("importance_cap", 2.0, "vllm_importance_sampling_clip_max", 2.0),
    ("vllm_importance_sampling_cap", 2.0, "vllm_importance_sampling_clip_max", 2.0),
    ("reduction", "token", "loss_type", "dapo"),
    ("reduction", "sequence", "loss_type", "grpo"),
    ("reduction", "constant", "loss_type", "dr_grpo"),
    ("reduction", "sum", "loss_type", "sum"),
]
CORRECTION = "vllm_importance_sampling_"
MODEL = {"similarity": "cosine", "item_temperature": 0.02, "softcap": None}


@pytest.fixture(autouse=True)
def warned_of_nothing(monkeypatch):
    monkeypatch.setattr(settings, "_warned", set())


@pytest.fixture
def trained(monkeypatch):
    """The configurations that `r2ec-fast train` would have trained with."""
    configs: list[RecPOConfig] = []
    monkeypatch.setattr(cli, "train", lambda data, model, config: configs.append(config))
    return configs


def future_warnings(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if w.category is FutureWarning]


def check_one_warning(found: list[str], old: str, new: str) -> None:
    (message,) = found
    assert message.startswith(f"{old} is now {new}")
    assert message.endswith("; release 0.3.0 removes the old name")


def test_every_old_name_is_tested():
    assert {old for old, *_ in OLD} == set(RENAMED)
    assert {new.name for new in RENAMED.values()} <= {
        f.name for f in dataclasses.fields(RecPOConfig)
    }


@pytest.mark.parametrize(("old", "value", "new", "expected"), OLD)
def test_old_name_in_python(old, value, new, expected):
    configs = []
    found = future_warnings(
        lambda: configs.extend(RecPOConfig(**{old: value}, top_k=7) for _ in range(2))
    )
    check_one_warning(found, old, new)
    assert configs == [RecPOConfig(**{new: expected}, top_k=7)] * 2


@pytest.mark.parametrize(("old", "value", "new", "expected"), OLD)
def test_old_name_as_an_attribute(old, value, new, expected):
    config = RecPOConfig()
    found = future_warnings(lambda: setattr(config, old, value))
    check_one_warning(found, old, new)
    assert getattr(config, new) == expected
    assert future_warnings(lambda: getattr(config, old)) == []
    assert getattr(config, old) == value
    assert old not in vars(config) and old not in config.to_dict()


@pytest.mark.parametrize(("old", "value", "new", "expected"), OLD)
def test_old_name_on_the_command_line(trained, old, value, new, expected):
    arguments = ["train", "--data", "d", f"--{old}", str(value)]
    found = future_warnings(lambda: [cli.run_command(arguments) for _ in range(2)])
    check_one_warning(found, old, new)
    assert trained == [RecPOConfig(**{new: expected})] * 2


@pytest.mark.parametrize(("old", "value", "new", "expected"), OLD)
def test_old_name_in_a_file(trained, tmp_path, old, value, new, expected):
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump({"data": "d", old: value, "top_k": 7}))
    found = future_warnings(lambda: cli.run_command(["train", "--config", str(file)]))
    check_one_warning(found, old, new)
    assert trained == [RecPOConfig(**{new: expected}, top_k=7)]


def test_an_empty_value_in_a_file(trained, tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("data: d\nimportance_cap: null\n")
    with pytest.warns(FutureWarning, match="importance_cap is now"):
        cli.run_command(["train", "--config", str(file)])
    assert trained == [RecPOConfig(vllm_importance_sampling_clip_max=None)]


@pytest.mark.parametrize(("old", "value", "new", "expected"), OLD)
def test_old_name_in_the_json_of_a_checkpoint(old, value, new, expected):
    stored = RecPOConfig(top_k=7).to_dict()
    del stored[new]
    stored = json.loads(json.dumps({**stored, old: value}))
    configs = []
    found = future_warnings(lambda: configs.append(RecPOConfig.from_dict(stored)))
    check_one_warning(found, old, new)
    assert configs == [RecPOConfig(**{new: expected}, top_k=7)]


def test_present_settings_survive_a_file():
    config = RecPOConfig(loss_type="bnpo", beta=0.5, eval_reasoning=False)
    stored = json.loads(json.dumps(config.to_dict()))
    assert future_warnings(lambda: RecPOConfig.from_dict(stored)) == []
    assert RecPOConfig.from_dict(stored) == config


def test_a_run_goes_on_from_a_checkpoint_with_old_names(tmp_path):
    changes = {"beta": 0.1, "loss_type": "sum"}
    metrics, parameters = run(tmp_path / "whole", **changes)
    run(tmp_path / "cut", **changes, max_steps=3)
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    file = checkpoint / "trainer_state.json"
    state = json.loads(file.read_text())
    for old, new in RENAMED.items():
        if new.name in state["config"]:  # else it has an older name already
            state["config"][old] = new.before(state["config"].pop(new.name))
    file.write_text(json.dumps(state))
    with pytest.warns(FutureWarning):
        config = RecPOConfig.from_dict(state["config"])
    assert (config.beta, config.loss_type) == (0.1, "sum")
    resumed, again = run(
        tmp_path / "cut",
        **{name: getattr(config, name) for name in (*changes, *RUN) if name != "max_steps"},
        resume_from_checkpoint=str(checkpoint),
    )
    assert resumed == metrics
    same(parameters, again, rtol=0, atol=0)
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


@pytest.mark.parametrize(("old", "value", "new", "expected"), OLD)
def test_old_and_new_name_together(trained, tmp_path, old, value, new, expected):
    message = f"{old}, {new}: one setting twice, give {new} only"
    with pytest.raises(ValueError, match=message):
        RecPOConfig(**{old: value, new: expected})
    # also where the new one is at its default
    default = getattr(RecPOConfig(), new)
    default = "null" if default is None else str(default)
    arguments = ["train", "--data", "d", f"--{old}", str(value), f"--{new}", default]
    with pytest.raises(ValueError, match=message):
        cli.run_command(arguments)
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump({"data": "d", old: value}))
    with pytest.raises(ValueError, match=message):
        cli.run_command(["train", "--config", str(file), f"--{new}", default])
    assert trained == []


def test_old_names_take_old_values_only():
    with pytest.raises(ValueError, match=r"reduction: expected one of token, .*, got 'dapo'"):
        RecPOConfig(reduction="dapo")
    with pytest.raises(ValueError, match=r"loss_type: expected one of dapo, bnpo, .* got 'token'"):
        RecPOConfig(loss_type="token")


def test_help_shows_new_names_only(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for old, new in RENAMED.items():
        assert f"--{new.name} " in text and f"--{old}" not in text


def test_the_printed_configuration_has_every_setting_under_its_new_name(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--data", "d", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert {f.name for f in dataclasses.fields(RecPOConfig)} <= printed.keys()
    assert not RENAMED.keys() & printed.keys()


@pytest.mark.parametrize(("old", "value", "new", "expected"), OLD)
def test_print_config_turns_a_file_of_old_names_into_one_of_new_ones(
    capsys, tmp_path, old, value, new, expected
):
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump({"data": "d", old: value}))
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", str(file), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed[new] == expected and old not in printed


def test_the_loss_gets_the_settings():
    assert RecPOConfig().loss_config(**MODEL).reduction == "sum"  # the paper's
    for loss_type, reduction in REDUCTIONS.items():
        assert RecPOConfig(loss_type=loss_type).loss_config(**MODEL).reduction == reduction
    loss = RecPOConfig(
        beta=0.1,
        importance_sampling_level="sequence",
        vllm_importance_sampling_mode="sequence_truncate",
        vllm_importance_sampling_clip_min=0.5,
        vllm_importance_sampling_clip_max=2.0,
        impl="reference",
    ).loss_config(**MODEL)
    assert (loss.kl_weight, loss.ratio_level) == (0.1, "sequence")
    assert (loss.importance_sampling_mode, loss.impl) == ("sequence_truncate", "reference")
    bounds = (loss.importance_sampling_clip_min, loss.importance_sampling_clip_max)
    assert bounds == (0.5, 2.0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lora_r", 0, "lora_r: expected at least 1, got 0"),
        ("warmup_steps", -1, "warmup_steps: expected at least 0, got -1"),
        ("beta", float("nan"), "beta: expected at least 0, got nan"),
        ("learning_rate", 0, "learning_rate: expected more than 0, got 0"),
        (CORRECTION + "clip_max", 0.0, f"{CORRECTION}clip_max: expected more than 0, got 0.0"),
        (CORRECTION + "clip_min", 3.0, f"{CORRECTION}clip_min: expected less than {CORRECTION}c"),
        (CORRECTION + "mode", "mask", f"{CORRECTION}mode: expected one of token_truncate, token_m"),
        ("reward_softmax_weight", 1.5, "reward_softmax_weight: expected 0 to 1, got 1.5"),
        ("estimator", "gae", "estimator: expected one of grpo, rloo, got 'gae'"),
        ("item_negatives", "all", "item_negatives: expected one of in-batch, catalog, got 'all'"),
        ("importance_sampling_level", "word", "importance_sampling_level: expected one of token"),
        ("impl", "cuda", "impl: expected one of auto, triton, torch, reference, got 'cuda'"),
        ("index_scan", "fp8", "index_scan: expected one of auto, none, fp16, bf16, int8"),
        ("lr_scheduler_type", "step", "lr_scheduler_type: expected one of constant_with_warmup"),
    ],
)
def test_a_value_outside_its_range(name, value, message):
    with pytest.raises(ValueError) as raised:
        RecPOConfig(**{name: value})
    assert str(raised.value).startswith(message)


def test_a_value_that_is_no_number():
    with pytest.raises(TypeError, match="save_total_limit: expected a number, got None"):
        RecPOConfig(save_total_limit=None)
