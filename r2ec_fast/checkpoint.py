"""Complete, atomic checkpoints without pickle: safetensors for tensors, JSON for the rest.

checkpoint-N/
  trainable.safetensors   every parameter that trains, by name
  optimizer.safetensors   its optimiser state, "parameter.state"
  item_index.safetensors  the item table
  loop.safetensors        generator state and the age of every row of the table
  trainer_state.json      step, best metric, scheduler, settings
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from r2ec_fast.files import replaced_directory
from r2ec_fast.model import INDEX_FILE, R2ecModel
from r2ec_kernels import ItemIndex

STATE_FILE = "trainer_state.json"
TRAINABLE_FILE = "trainable.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
LOOP_FILE = "loop.safetensors"


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in a fixed order."""
    return {n: p for n, p in sorted(model.named_parameters()) if p.requires_grad}


def save_checkpoint(
    directory: Path, model: R2ecModel, optimizer: torch.optim.Optimizer, state: dict
) -> None:
    """Write a checkpoint; ``directory`` appears only when it is whole.

    ``state`` holds JSON values and, on its first level, tensors.

    Raises OSError, naming the directory, where it cannot be written (full disk, no permission).
    """
    from safetensors.torch import save_file

    names = {p: n for n, p in trainable_parameters(model).items()}
    tensors = {n: p.detach().contiguous() for p, n in names.items()}
    moments = {
        f"{names[p]}.{key}": value.contiguous() if value.ndim else value.reshape(1)
        for p, values in optimizer.state.items()
        for key, value in values.items()
        if isinstance(value, torch.Tensor)
    }
    with replaced_directory(directory) as temporary:
        save_file(tensors, temporary / TRAINABLE_FILE)
        save_file(moments, temporary / OPTIMIZER_FILE)
        if model.index is not None:
            model.index.save(temporary / INDEX_FILE)
        loop = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        save_file({**loop, "torch_generator": torch.get_rng_state()}, temporary / LOOP_FILE)
        values = {k: v for k, v in state.items() if k not in loop}
        (temporary / STATE_FILE).write_text(json.dumps(values) + "\n")


def load_checkpoint(
    directory: Path, model: R2ecModel, optimizer: torch.optim.Optimizer | None = None
) -> dict:
    """Put a checkpoint back into ``model`` (and ``optimizer``); returns its state.

    Raises FileNotFoundError where there is none, ValueError where a file is damaged or belongs to
    another model.
    """
    directory = Path(directory)
    if not (directory / STATE_FILE).is_file():
        raise FileNotFoundError(f"resume_from_checkpoint: no checkpoint in {directory}")
    state = json.loads((directory / STATE_FILE).read_text())
    parameters = trainable_parameters(model)
    saved = _read_tensors(directory / TRAINABLE_FILE)
    if saved.keys() != parameters.keys():
        odd = sorted(saved.keys() ^ parameters.keys())[:3]
        raise ValueError(
            f"{directory}: trained parameters of another model or adapter: {', '.join(odd)} ..."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if saved[name].shape != parameter.shape:
                raise ValueError(
                    f"{directory}: {name} has shape {tuple(saved[name].shape)}, "
                    f"expected {tuple(parameter.shape)}"
                )
            parameter.copy_(saved[name])
    if optimizer is not None:
        moments = _read_tensors(directory / OPTIMIZER_FILE)
        for name, parameter in parameters.items():
            prefix = f"{name}."
            own = {k[len(prefix) :]: v for k, v in moments.items() if k.startswith(prefix)}
            optimizer.state[parameter] = {
                key: value.reshape(()) if key == "step" else value.to(parameter.device)
                for key, value in own.items()
            }
        loop = _read_tensors(directory / LOOP_FILE)
        torch.set_rng_state(loop.pop("torch_generator"))
        state |= loop
    if (directory / INDEX_FILE).is_file():
        model.index = ItemIndex.load(directory / INDEX_FILE)
    return state


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: damaged or missing ({error}); take an older checkpoint"
        ) from error


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if (p / STATE_FILE).is_file()]
    return max(found, key=_step_of, default=None)


def prune_checkpoints(output_dir: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    found = sorted(Path(output_dir).glob("checkpoint-*"), key=_step_of)
    for path in found[: max(len(found) - keep, 0)]:
        shutil.rmtree(path)


def _step_of(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])
