"""Put a model into another mode for a while, and back exactly as it was; what models differ in."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode: no dropout, no checkpointing. Restores each module's own flag."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def attention_implementation(model: "PreTrainedModel", name: str) -> Iterator[None]:
    """Run with attention implementation `name`; restores what each (sub-)config had.

    Raises:
        ValueError: the model cannot switch its attention implementation.
    """
    configs: dict[int, tuple[Any, str]] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            configs.setdefault(id(config), (config, config._attn_implementation))
    if all(current == name for _, current in configs.values()):
        yield
        return
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise ValueError(
                f"{type(model).__name__} cannot run with attention implementation {name!r}"
            )
        yield
    finally:
        for config, current in configs.values():
            config._attn_implementation_internal = current


@contextmanager
def last_layer_at(decoder: nn.Module, rows: torch.Tensor) -> Iterator[None]:
    """Compute what the last layer does position by position at ``rows`` (int64 [R]) alone.

    For a batch [1, T, d] of which only the states at ``rows`` are read, without gradient. The
    output projection of the attention and the MLP, 84% of the weights of a Llama layer, then see R
    tokens; what the other rows hold afterwards is of no use. A decoder with other names runs whole.
    """
    layers = getattr(decoder, "layers", None)
    last = layers[-1] if layers is not None and len(layers) else None
    parts = [getattr(getattr(last, "self_attn", None), "o_proj", None), getattr(last, "mlp", None)]
    handles = []
    length = 0

    def spread(module: nn.Module, inputs: tuple, out: torch.Tensor) -> torch.Tensor:
        return out.new_zeros(1, length, out.shape[-1]).index_copy(1, rows, out)

    def select(module: nn.Module, inputs: tuple) -> tuple[torch.Tensor]:
        nonlocal length
        length = inputs[0].shape[1]
        return (inputs[0][:, rows],)

    try:
        for part in filter(None, parts):
            handles += [
                part.register_forward_pre_hook(select),
                part.register_forward_hook(spread),
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()


def cache_argument(kind: type[nn.Module]) -> str:
    """What a causal LM or decoder of this class calls the cache of keys and values: ``cache`` from
    transformers 5.24 on, ``past_key_values`` before."""
    return "cache" if "cache" in _argument_names(kind.forward) else "past_key_values"


@cache
def _argument_names(function: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def base_causal_lm(model: nn.Module) -> "PreTrainedModel":
    """The Hugging Face causal LM inside a PeftModel, or the model itself."""
    wrapped: Any = model  # peft is optional
    return wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped


def model_device(model: nn.Module) -> torch.device:
    """Where the token embeddings live: the device of the model's inputs."""
    return next(base_causal_lm(model).get_input_embeddings().parameters()).device
