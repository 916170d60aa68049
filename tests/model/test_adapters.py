"""LoRA adapters: where they may sit, and which base model they belong to."""

from __future__ import annotations

import json

import pytest
import torch
from _support.toy import toy_model

from r2ec_fast.model import R2ecModel


@pytest.mark.parametrize(
    "targets", [("q_proj", "lm_head"), ("lm_head",), ("q_proj", "embed_tokens")], ids=" ".join
)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_adapters_on_a_token_table_are_refused(kind, targets):
    model = toy_model(kind)
    with pytest.raises(ValueError, match=f"target_modules: .*{targets[-1]}"):
        model.add_lora(target_modules=targets)
    assert not hasattr(model.backbone, "get_base_model")  # nothing was changed


def test_a_peft_model_with_an_adapter_on_the_head_is_refused():
    from peft import LoraConfig, get_peft_model

    model = toy_model("qwen2")
    wrapped = get_peft_model(model.backbone, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="adapters on lm_head are not supported"):
        R2ecModel(wrapped, model.tokenizer)


def test_a_relative_base_path_is_stored_whole(tmp_path, monkeypatch):
    toy_model(dtype=torch.float32).save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = R2ecModel.from_pretrained("base")
    model.add_lora(r=2)
    model.save_pretrained("adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = R2ecModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(again.lm_head_weight, model.lm_head_weight)


@pytest.mark.parametrize("base", ["/nowhere/base", "./base", "../models/base", "a/b/c"])
def test_a_base_that_is_gone_is_named_and_the_hub_not_asked(tmp_path, monkeypatch, base):
    model = toy_model(dtype=torch.float32)
    model.add_lora(r=2)
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    monkeypatch.setattr("socket.socket.connect", lambda *given: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match=f"its base model '{base}' is not there"):
        R2ecModel.from_pretrained(tmp_path / "adapter")
