"""Liger's kernels inside the backbone: refused where they cannot run, equal where they can."""

from __future__ import annotations

import builtins
import copy

import pytest
import torch
from _support.backbones import KINDS, toy_backbone

from r2ec_fast.model.liger import apply_liger_kernel


def backbone(kind: str, **settings):
    return toy_backbone(kind, dtype=torch.float32, seed=0, scale=1.0, **settings).eval()


def on_gpu(monkeypatch, model):
    """As if it were there."""
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    return model


def test_a_cpu_is_refused():
    with pytest.raises(RuntimeError, match="use_liger_kernel: .* need a GPU, .* on cpu"):
        apply_liger_kernel(backbone("llama"))


def test_a_missing_package_is_named(monkeypatch):
    model, real = on_gpu(monkeypatch, backbone("llama")), builtins.__import__

    def without(name, *arguments):
        if name.startswith("liger_kernel"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"use_liger_kernel: .*pip install 'r2ec-fast\[cuda\]'"):
        apply_liger_kernel(model)


@pytest.mark.peers
def test_an_unknown_kind_of_model_is_refused(monkeypatch):
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    model = on_gpu(monkeypatch, backbone("llama"))
    model.config.model_type = "toy"
    with pytest.raises(ValueError, match="expected a model of type .*llama.*, got toy"):
        apply_liger_kernel(model)


@pytest.mark.peers
@pytest.mark.parametrize("wrapped", [False, True])
def test_norms_and_activations_are_ligers(monkeypatch, wrapped):
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    from peft import LoraConfig, get_peft_model

    model = on_gpu(monkeypatch, backbone("llama"))
    forward = model.forward
    given = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if wrapped else model
    apply_liger_kernel(given)
    layer = model.model.layers[0]
    for module in (layer.input_layernorm, layer.mlp, model.model.norm):
        assert "Liger" in module.forward.__qualname__
    assert model.forward == forward  # the loss stays ours


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gemma3"])
def test_the_patched_model_is_the_model(kind):
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    plain = backbone(kind).cuda()
    patched = copy.deepcopy(plain)
    apply_liger_kernel(patched)
    ids = torch.randint(4, 400, (2, 40), device="cuda")
    torch.testing.assert_close(patched(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    for model in (plain, patched):
        model(ids).logits.square().mean().backward()
    for ours, theirs in zip(plain.parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
