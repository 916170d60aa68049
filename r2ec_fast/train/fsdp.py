"""Weights, gradients and optimiser state sharded over processes: torch's fully_shard (FSDP2).

Each decoder layer is a unit: its weights are gathered for its forward and backward pass and freed
afterwards. The token tables stay whole on every process, because the loss reads the head directly.

A gather needs every process at the same place, so with sharded weights all processes run the same
number of passes with gradient (the update sees to it), and everything without gradient, where that
number differs (rollouts, evaluation, catalog refresh), runs inside :func:`gathered`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from r2ec_fast.config import RecPOConfig
from r2ec_fast.model.r2ec import R2ecModel
from r2ec_fast.rollout import RolloutEngine, TransformersEngine
from r2ec_fast.train import distributed


def wanted(config: RecPOConfig, engine: RolloutEngine | None) -> bool:
    """Whether the run shards: its setting ``fsdp``, or accelerate's configuration.

    Raises ValueError for DeepSpeed and FSDP1, and for what cannot work on sharded weights.
    """
    if _launched_with("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "accelerate's configuration: DeepSpeed is not supported, because its engine owns the "
            "backward pass and a step here has several; take configs/accelerate/fsdp2.yaml"
        )
    if _launched_with("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise ValueError(f"accelerate's configuration: expected fsdp_version 2, got {version}")
    elif not config.fsdp:
        return False
    if not isinstance(engine, TransformersEngine | None):
        raise ValueError(
            "engine: sharded weights (fsdp) are sampled by TransformersEngine alone, got "
            f"{type(engine).__name__}"
        )
    if config.rollout_server is not None:
        raise ValueError(
            "rollout_server: sharded weights (fsdp) are sampled in their own processes, expected "
            f"none, got {config.rollout_server!r}"
        )
    if config.optim != "adamw_torch":
        raise ValueError(f"optim: fsdp needs 'adamw_torch', got {config.optim!r}")
    if config.train_embeddings:
        raise ValueError(
            "train_embeddings: fsdp leaves the token tables as they are; expected false"
        )
    return True


def _launched_with(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def shard(model: R2ecModel) -> None:
    """Shard the backbone over all processes, in place; call it before the optimiser is made.

    Raises ValueError for an architecture without a list of decoder layers, and for one process.
    """
    if distributed.world()[1] == 1:
        raise ValueError("fsdp: expected several processes (accelerate launch, torchrun), got one")
    from torch.distributed.device_mesh import init_device_mesh

    decoder = model.language_model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"fsdp: expected a decoder with a list of layers, got {type(decoder).__name__}; "
            "set fsdp=false"
        )
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    tables = (model.language_model.get_input_embeddings().weight, model.lm_head_weight)
    kept_whole = {table for table in tables if isinstance(table, nn.Parameter)}
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(decoder, mesh=mesh, ignored_params=kept_whole)
    for module in _units(model):
        # the loss is divided by the counts of all processes: gradients are summed, not averaged
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other in float32


def is_sharded(model: R2ecModel) -> bool:
    """Whether :func:`shard` was called on the model."""
    return isinstance(model.language_model.get_decoder(), FSDPModule)


@contextmanager
def gathered(model: R2ecModel) -> Iterator[None]:
    """Whole weights on every process while the block runs; without sharding, nothing.

    All processes must enter together. Inside, passes need no other process; none with gradient. A
    call of ``state_dict`` would end it: see :func:`saveable`.
    """
    units = _units(model)
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


@contextmanager
def saveable(model: R2ecModel) -> Iterator[None]:
    """Let ``state_dict`` of the backbone, and so ``save_pretrained``, give whole tensors.

    All processes must enter together; each then holds a copy of what is saved: the adapter, or all
    weights.
    """
    if not is_sharded(model):
        yield
        return
    adapter = hasattr(model.backbone, "get_base_model")
    full = {
        name: whole(parameter).detach()
        for name, parameter in model.backbone.named_parameters()
        if parameter.requires_grad or not adapter
    }

    def replace(_: nn.Module, state: dict, prefix: str, __: dict) -> None:
        state.update({f"{prefix}{name}": value for name, value in full.items()})

    handle = model.backbone.register_state_dict_post_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one (all processes must call it); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def like(value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """A full tensor laid out as ``parameter`` is: on its device, sharded if it is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def _units(model: R2ecModel) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
