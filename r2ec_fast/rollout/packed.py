"""Weights in oneDNN's blocked layout for the few-row products of decoding on CPU.

A product of a few rows is bound by reading the weight, but the general float32 GEMM first copies
the weight into its own layout, in every call. One reordering per rollout removes that copy. A LoRA
adapter is added to its weight on the way, so that decoding does not run it beside every layer. The
model's own weights are not touched.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_ROWS = 512  # beyond, the general GEMM is as fast
LAYOUT_ROWS = 8  # the row count the layout is chosen for; it serves 1 to 512 well
MIN_STEPS = 32  # a shorter rollout does not earn the reordering back
MIN_NUMEL = 1 << 16  # smaller weights stay in cache


def packing_available() -> bool:
    """oneDNN is compiled in and switched on, and no autocast changes the type of the products."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not torch.is_autocast_enabled("cpu")
    )


def _packable(module: nn.Module) -> bool:
    """A plain float32 CPU `nn.Linear` of some size, whose forward nobody has replaced."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight
    return (
        type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= MIN_NUMEL
    )


def _foldable(module: nn.Module) -> bool:
    """A plain LoRA layer (no DoRA or other variant, no bias of its own) around a packable layer."""
    if sys.modules.get("peft") is None:  # never imported: nothing here is a layer of its
        return False
    from peft.tuners.lora import Linear as LoraLinear

    return (
        type(module) is LoraLinear
        and "forward" not in module.__dict__
        and _packable(module.base_layer)
        and not module.merged
        and not module.disable_adapters
        and not module.lora_variant
        and not any(module.lora_bias.values())
    )


def _packed(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), LAYOUT_ROWS)
    product = torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, packed, bias, "none", [], "")


def _linear_forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight, bias = module.weight, module.bias
    few = _packed(weight, bias)

    def forward(input: Tensor) -> Tensor:
        if input.numel() <= MAX_ROWS * weight.shape[1]:
            return few(input)
        return F.linear(input, weight, bias)

    return forward


def _lora_forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    weight = module.base_layer.weight.detach()
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            weight = weight + module.get_delta_weight(adapter)
    return _packed(weight, module.base_layer.bias)


@contextmanager
def packed_linears(model: nn.Module, steps: int) -> Iterator[int]:
    """Run the large float32 CPU linear layers of `model` on reordered weights; yields how many.

    Costs one copy of their weights in memory while it lasts. The weights must not change inside.

    Args:
        steps: decoding steps to come; a rollout of few steps is left alone.
    """
    lora, linear = [], []
    if steps >= MIN_STEPS and packing_available():
        lora = [module for module in model.modules() if _foldable(module)]
        folded = {id(module.base_layer) for module in lora}
        linear = [
            module for module in model.modules() if _packable(module) and id(module) not in folded
        ]
    try:
        for module in lora:
            module.forward = _lora_forward(module)
        for module in linear:
            module.forward = _linear_forward(module)
        yield len(lora) + len(linear)
    finally:
        for module in lora + linear:
            module.__dict__.pop("forward", None)
