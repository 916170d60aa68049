"""Liger's Triton kernels inside the backbone: RMSNorm, SwiGLU or GEGLU, and rotary embeddings.

They replace the modules' own forward functions, in place, by liger-kernel's function for this type
of model. Liger's losses stay out: the fused loss here never makes logits.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

LEFT_OUT = {"fused_linear_cross_entropy": False, "cross_entropy": False}


def apply_liger_kernel(backbone: torch.nn.Module) -> None:
    """Patch a causal language model (or its peft wrapper) in place.

    Raises:
        ImportError: liger-kernel is not installed.
        RuntimeError: the model is not on a GPU, where alone these kernels run.
        ValueError: liger-kernel has none for this type of model.
    """
    model = _plain(backbone)
    device, kind = model.device, model.config.model_type
    if device.type == "cpu":
        raise RuntimeError(
            f"use_liger_kernel: its Triton kernels need a GPU, and the model is on {device}"
        )
    try:
        from liger_kernel.transformers.monkey_patch import (
            MODEL_TYPE_TO_APPLY_LIGER_FN,
            _apply_liger_kernel_to_instance,
        )
    except ImportError as error:
        raise ImportError(
            f"use_liger_kernel: {error}; pip install 'r2ec-fast[cuda]'", name="liger_kernel"
        ) from error
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise ValueError(f"use_liger_kernel: expected a model of type {known}, got {kind}")
    _apply_liger_kernel_to_instance(model=model, **LEFT_OUT)


def _plain(backbone: Any) -> PreTrainedModel:
    """The language model inside a peft wrapper."""
    model = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone
    assert isinstance(model, PreTrainedModel)
    return model
