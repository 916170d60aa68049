"""Weights in oneDNN's blocked layout for the few-row products of decoding on CPU.

A product of a few rows is bound by reading the weight, but the general GEMM first copies the weight
into its own layout, in every call. One reordering per rollout removes that copy. A LoRA adapter is
added to a float32 weight on the way, so that decoding does not run it beside every layer; bfloat16
would round most of it away. The model's own weights are not touched.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as LoraLinear

Layer = TypeVar("Layer", bound=nn.Module)

MAX_ROWS = 512  # beyond, the general GEMM is as fast
LAYOUT_ROWS = 8  # the row count the layout is chosen for; it serves 1 to 512 well
MIN_STEPS = 32  # a shorter rollout does not earn the reordering back
MIN_NUMEL = 1 << 16  # smaller weights stay in cache


def packing_available() -> bool:
    """oneDNN is compiled in and switched on, and no autocast changes the type of the products."""
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not torch.is_autocast_enabled("cpu")
    )


def _packable_types() -> tuple[torch.dtype, ...]:
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32, torch.bfloat16
    return (torch.float32,)


def _packable(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A plain CPU `nn.Linear` of some size and a type that oneDNN multiplies, whose forward nobody
    has replaced."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight
    return (
        type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and weight.dtype in _packable_types()
        and weight.numel() >= MIN_NUMEL
    )


def _foldable(module: nn.Module) -> "TypeGuard[LoraLinear]":
    """A plain LoRA layer (no DoRA or other variant, no bias of its own) around a packable layer."""
    if sys.modules.get("peft") is None:  # never imported: nothing here is a layer of its
        return False
    from peft.tuners.lora import Linear

    return (
        type(module) is Linear
        and "forward" not in module.__dict__
        and _packable(module.base_layer)
        and module.base_layer.weight.dtype == torch.float32
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


def _lora_forward(module: "LoraLinear") -> Callable[[Tensor], Tensor]:
    base = cast(nn.Linear, module.base_layer)  # _foldable has looked
    weight = base.weight.detach()
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            weight = weight + module.get_delta_weight(adapter)
    return _packed(weight, base.bias)


def _stamp(module: nn.Module) -> tuple:
    """What a module's copy depends on: equal while its weights are the same, unchanged tensors."""
    weights = [(p.data_ptr(), p._version) for p in module.parameters()]
    adapters = getattr(module, "active_adapters", ()), getattr(module, "scaling", {}).values()
    return (*weights, *adapters[0], *adapters[1])


class PackedLinears:
    """The reordered weights of a model's large linear layers, kept from one use to the next.

    A copy is made anew where a weight has changed since. Costs one more set of the weights in
    memory for as long as it lives.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._made: dict[nn.Module, tuple[tuple, Callable[[Tensor], Tensor]]] = {}

    @contextmanager
    def installed(self, steps: int) -> Iterator[int]:
        """Run the large CPU linear layers on reordered weights; yields how many.

        The weights must not change inside.

        Args:
            steps: decoding steps to come; a rollout of few steps is left alone.
        """
        lora: list[LoraLinear] = []
        linear: list[nn.Linear] = []
        if steps >= MIN_STEPS and packing_available():
            modules = list(self._model.modules())
            lora = [module for module in modules if _foldable(module)]
            folded = {id(module.base_layer) for module in lora}
            linear = [m for m in modules if _packable(m) and id(m) not in folded]
        try:
            for adapted in lora:
                adapted.__dict__["forward"] = self._forward(adapted, _lora_forward)
            for plain in linear:
                plain.__dict__["forward"] = self._forward(plain, _linear_forward)
            yield len(lora) + len(linear)
        finally:
            for module in (*lora, *linear):
                module.__dict__.pop("forward", None)

    def _forward(
        self, module: Layer, make: Callable[[Layer], Callable[[Tensor], Tensor]]
    ) -> Callable[[Tensor], Tensor]:
        stamp = _stamp(module)
        if module not in self._made or self._made[module][0] != stamp:
            self._made[module] = (stamp, make(module))
        return self._made[module][1]


def packed_linears(model: nn.Module, steps: int) -> AbstractContextManager[int]:
    """`PackedLinears.installed` with copies that are dropped at the end."""
    return PackedLinears(model).installed(steps)
