"""Put a model into another mode for a while, and back exactly as it was; what models differ in.

A mode is state of modules that threads share. So whoever changes one holds the model's lock until
it is put back: passes of several threads over one model run one after another, each in its mode.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock, RLock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

FEW_ROWS = 16
"""Matrix products of fewer rows round otherwise than those of more, so fewer are never made: a
row's numbers then do not depend on the rows beside it (CPUs)."""

_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_locks_guard = Lock()


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Hold the lock of a model, the same for its decoder and for what wraps it (peft, R2ecModel);
    a thread that holds it may take it again."""
    module: Any = getattr(model, "backbone", model)
    key = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else module
    with _locks_guard:
        lock = _locks.setdefault(key, RLock())
    with lock:
        yield


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode: no dropout, no checkpointing. Restores each module's own flag."""
    with exclusive(model):
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
    with exclusive(model), _switched_attention(model, name):
        yield


@contextmanager
def _switched_attention(model: "PreTrainedModel", name: str) -> Iterator[None]:
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

    spare = rows[:1].expand(max(0, FEW_ROWS - len(rows)))

    def spread(module: nn.Module, inputs: tuple, out: torch.Tensor) -> torch.Tensor:
        wanted = out[:, : len(rows)]
        return out.new_zeros(1, length, out.shape[-1]).index_copy(1, rows, wanted)

    def select(module: nn.Module, inputs: tuple) -> tuple[torch.Tensor]:
        nonlocal length
        length = inputs[0].shape[1]
        return (inputs[0][:, torch.cat([rows, spare])],)

    length = 0
    with exclusive(decoder):
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


@contextmanager
def quiet_renames() -> Iterator[None]:
    """Without the warnings that peft, not its caller, uses old names of transformers."""
    with warnings.catch_warnings():
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            warnings.filterwarnings("ignore", f".*{name}.*deprecated", FutureWarning)
        yield


def context_limit(config: "PreTrainedConfig") -> int | None:
    """The longest row a model reads, tokens; None: the configuration names none.

    Rotary frequencies that follow the length of a row (dynamic NTK, LongRoPE) would be taken from
    the longest row of a packed batch. Such models read rows of the length they were trained on
    first: within it the frequencies are fixed, and no row depends on its neighbours.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    for kind in _rope_settings(text):
        if _follows_length(kind):
            trained = kind.get("original_max_position_embeddings")
            trained = trained or getattr(text, "original_max_position_embeddings", None) or limit
            limit = trained if limit is None else min(limit, trained)
    return limit


def rope_follows_length(config: "PreTrainedConfig") -> bool:
    """Whether rotary frequencies follow the length of a row (dynamic NTK, LongRoPE), which a model
    then asks its positions for in every pass."""
    return any(map(_follows_length, _rope_settings(config.get_text_config())))


def _rope_settings(text: "PreTrainedConfig") -> list[dict[str, Any]]:
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return [rope] if "rope_type" in rope else [v for v in rope.values() if isinstance(v, dict)]


def _follows_length(rope: dict[str, Any]) -> bool:
    return rope.get("rope_type") == "longrope" or "dynamic" in str(rope.get("rope_type"))


def base_causal_lm(model: nn.Module) -> "PreTrainedModel":
    """The Hugging Face causal LM inside a PeftModel, or the model itself."""
    wrapped: Any = model  # peft is optional
    return wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped


def model_device(model: nn.Module) -> torch.device:
    """Where the token embeddings live: the device of the model's inputs."""
    return next(base_causal_lm(model).get_input_embeddings().parameters()).device
