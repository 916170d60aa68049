"""Complete, atomic checkpoints without pickle: safetensors for tensors, JSON for the rest.

checkpoint-N/
  trainable.safetensors   every parameter that trains, by name
  optimizer.safetensors   its optimiser state, "parameter.state"
  item_index.safetensors  the item table
  loop.safetensors        generators of every process, and the age of every row of the table
  trainer_state.json      step, best metric, scheduler, settings
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from r2ec_fast.model.r2ec import INDEX_FILE, R2ecModel
from r2ec_fast.train import distributed
from r2ec_fast.train.fsdp import like, whole
from r2ec_fast.utils.atomic_files import (
    finish_interrupted,
    put_aside,
    remove_owned,
    remove_partial,
    updated_directory,
)
from r2ec_fast.utils.random_state import random_state, restore_random_state
from r2ec_kernels import ItemIndex

STATE_FILE = "trainer_state.json"
TRAINABLE_FILE = "trainable.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
LOOP_FILE = "loop.safetensors"
FILES = (TRAINABLE_FILE, OPTIMIZER_FILE, LOOP_FILE, INDEX_FILE, STATE_FILE)


class CheckpointError(ValueError):
    """A checkpoint is damaged, or belongs to another model."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint is whole, but not of this model or these settings."""


# settings that decide which tensors a checkpoint holds; any other may change on the way
_FIXED = ("use_lora", "train_embeddings", "lora_r", "optim")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in a fixed order."""
    return {n: p for n, p in sorted(model.named_parameters()) if p.requires_grad}


def checkpoint_tensors(
    model: R2ecModel, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, torch.Tensor]]:
    """File -> tensors of model and optimiser, whole where they are sharded (all processes call
    it; only the main one keeps what it gathers)."""
    keep = distributed.world()[0] == 0
    tensors: dict[str, dict[str, torch.Tensor]] = {TRAINABLE_FILE: {}, OPTIMIZER_FILE: {}}
    for name, parameter in trainable_parameters(model).items():
        found = {(TRAINABLE_FILE, name): parameter.detach()} | {
            (OPTIMIZER_FILE, f"{name}.{key}"): value
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, torch.Tensor)
        }
        for (file, key), value in found.items():
            value = whole(value)
            if keep:
                tensors[file][key] = value.contiguous() if value.ndim else value.reshape(1)
    return tensors


def save_checkpoint(
    directory: Path,
    tensors: Mapping[str, dict[str, torch.Tensor]],
    index: ItemIndex | None,
    state: dict,
) -> None:
    """Write a checkpoint; it is there only when it is whole. Other files in ``directory`` stay.

    ``tensors`` as :func:`checkpoint_tensors` gives them; ``state`` holds JSON values and, on its
    first level, tensors.

    Raises OSError, naming the directory, where it cannot be written (full disk, no permission).
    What was there before is then still there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    loop = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    values = {k: v for k, v in state.items() if k not in loop}
    try:
        with updated_directory(directory, owned=FILES.__contains__) as temporary:
            for file, content in {**tensors, LOOP_FILE: loop}.items():
                save_file(content, temporary / file)
            if index is not None:
                index.save(temporary / INDEX_FILE)
            (temporary / STATE_FILE).write_text(json.dumps(values) + "\n")
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{directory} cannot be written ({error}); earlier checkpoints are untouched: make "
            "room and start again with resume_from_checkpoint=latest"
        ) from error


def load_checkpoint(
    directory: Path,
    model: R2ecModel,
    optimizer: torch.optim.Optimizer | None = None,
    settings: Mapping[str, object] | None = None,
) -> dict:
    """Put a checkpoint back into ``model`` (and ``optimizer``); returns its state.

    Everything is read and checked before anything changes. Raises FileNotFoundError where there is
    none, CheckpointError where a file is damaged, CheckpointMismatch where it belongs to another
    model or was written with other ``settings`` that decide what it holds.
    """
    directory = Path(directory)
    if not (directory / STATE_FILE).is_file():
        raise FileNotFoundError(f"resume_from_checkpoint: no checkpoint in {directory}")
    state = _read_state(directory / STATE_FILE)
    _check_settings(directory, state.get("config", {}), settings or {})
    parameters = trainable_parameters(model)
    saved = _read_tensors(directory / TRAINABLE_FILE)
    _check_parameters(directory, saved, parameters)
    moments = None if optimizer is None else _read_tensors(directory / OPTIMIZER_FILE)
    loop = {} if optimizer is None else _read_tensors(directory / LOOP_FILE)
    index = model.index
    if (directory / INDEX_FILE).is_file():
        try:
            index = ItemIndex.load(directory / INDEX_FILE)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{directory / INDEX_FILE}: damaged ({error})") from error
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(like(saved[name], parameter))
    if optimizer is not None and moments is not None:
        for name, parameter in parameters.items():
            optimizer.state[parameter] = _moments_of(name, parameter, moments)
    model.index = index
    return state | loop


def load_wanted(
    wanted: str,
    output_dir: Path,
    model: R2ecModel,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, object],
) -> dict:
    """The checkpoint that ``resume_from_checkpoint`` names: a directory, or "latest".

    A damaged latest one is an error that names the one before it: which to take is not for a
    program to decide.
    """
    if wanted != "latest":
        return load_checkpoint(Path(wanted), model, optimizer, settings)
    found = checkpoints(output_dir)
    if not found:
        raise FileNotFoundError(f"resume_from_checkpoint: no checkpoint in {output_dir}")
    try:
        return load_checkpoint(found[-1], model, optimizer, settings)
    except CheckpointMismatch:
        raise
    except CheckpointError as error:
        way_on = (
            f"the one before it: resume_from_checkpoint={found[-2]}"
            if found[1:]
            else ("there is none before it")
        )
        raise CheckpointError(f"the latest checkpoint is damaged: {error}; {way_on}") from error


def keep_best(best: Mapping[str, float], wanted: str, output_dir: Path) -> bool:
    """Whether ``output_dir/best`` is, or now becomes, the checkpoint of the metrics ``best``.

    A run that resumes into another directory takes it from beside the checkpoint ``wanted``. It is
    gone where the earlier run went on from that checkpoint and found a better one.
    """
    beside = output_dir if wanted == "latest" else Path(wanted).parent
    for directory in (output_dir / "best", beside / "best"):
        if not (directory / STATE_FILE).is_file():
            continue
        # as text: standard errors may be NaN
        if json.dumps(_read_state(directory / STATE_FILE).get("best")) == json.dumps(best):
            if directory != output_dir / "best":
                target = output_dir / "best"
                with updated_directory(target, "output_dir", owned=FILES.__contains__) as temporary:
                    for name in filter(lambda name: (directory / name).is_file(), FILES):
                        shutil.copy2(directory / name, temporary / name)
            return True
    return False


def generator_states() -> dict[str, torch.Tensor]:
    """The random generators of every process, for a checkpoint."""
    every = distributed.gather_objects(random_state())
    return {f"generator.{r}.{d}": v for r, states in enumerate(every) for d, v in states.items()}


def restore_generators(state: Mapping[str, torch.Tensor]) -> None:
    """Put this process's generators back, where the run that wrote ``state`` had as many."""
    own = f"generator.{distributed.world()[0]}."
    restore_random_state({k.removeprefix(own): v for k, v in state.items() if k.startswith(own)})


def _check_settings(
    directory: Path, saved: Mapping[str, object], now: Mapping[str, object]
) -> None:
    for name in _FIXED:
        if name in saved and name in now and saved[name] != now[name]:
            raise CheckpointMismatch(
                f"{name}: {directory} was written with {saved[name]!r}, this run asks for "
                f"{now[name]!r}; resume with the old value, or start a new run"
            )


def _check_parameters(
    directory: Path, saved: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]
) -> None:
    if saved.keys() != parameters.keys():
        odd = sorted(saved.keys() ^ parameters.keys())[:3]
        raise CheckpointMismatch(
            f"{directory}: trained parameters of another model or adapter: {', '.join(odd)} ..."
        )
    for name, parameter in parameters.items():
        if saved[name].shape != parameter.shape:
            raise CheckpointMismatch(
                f"{directory}: {name} has shape {tuple(saved[name].shape)}, "
                f"expected {tuple(parameter.shape)}"
            )


def _moments_of(name: str, parameter: nn.Parameter, moments: Mapping[str, torch.Tensor]) -> dict:
    prefix = f"{name}."
    own = {k[len(prefix) :]: v for k, v in moments.items() if k.startswith(prefix)}
    return {
        key: value.reshape(()) if key == "step" else like(value, parameter)
        for key, value in own.items()
    }


def _read_state(path: Path) -> dict:
    try:
        state = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); take an older checkpoint") from error
    if not isinstance(state, dict) or "step" not in state:
        raise CheckpointError(f"{path}: damaged (no step in it); take an older checkpoint")
    return state


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged or missing ({error}); take an older checkpoint"
        ) from error


def checkpoints(output_dir: Path, run: str | None = None) -> list[Path]:
    """The complete checkpoints in ``output_dir``, oldest first; with ``run`` only those of the run
    of this id."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.name[11:].isdigit()]
    found = [p for p in found if (p / STATE_FILE).is_file()]
    if run is not None:
        found = [p for p in found if _run_of(p) == run]
    return sorted(found, key=lambda p: int(p.name[11:]))


def _run_of(directory: Path) -> str | None:
    try:
        return _read_state(directory / STATE_FILE).get("run")
    except CheckpointError:
        return None


def refuse_results(output_dir: Path, run: str | None = None) -> None:
    """Raise ValueError where ``output_dir`` holds results that a run would replace, or that would
    pass for its own: any of a new run's (``run`` None), another run's where ``run`` goes on."""
    found = checkpoints(output_dir)
    if run is not None:  # checkpoints of version 0.1.0 name no run
        found = [path for path in found if _run_of(path) not in (None, run)]
    elif (Path(output_dir) / "best" / STATE_FILE).is_file():
        found.append(Path(output_dir) / "best")
    if found:
        names = ", ".join(path.name for path in found[:4]) + (", ..." if found[4:] else "")
        raise ValueError(
            f"output_dir: {output_dir} holds results of another run ({names}) that this one "
            "would replace; go on with it (resume_from_checkpoint=latest), choose another "
            "output_dir, or move them away"
        )


def set_aside(output_dir: Path, step: int) -> list[str]:
    """Rename the checkpoints after ``step``, from which a run now goes on in another way, so that
    none of them passes for its latest; returns their new names."""
    later = [path for path in checkpoints(output_dir) if int(path.name[11:]) > step]
    return [put_aside(path).name for path in later]


def prune_checkpoints(output_dir: Path, keep: int, run: str) -> None:
    """Delete all but the newest ``keep`` checkpoints of the run ``run``: the files that checkpoints
    consist of, and their directories where nothing else is in them."""
    for path in checkpoints(output_dir, run)[:-keep]:
        remove_owned(path, FILES.__contains__)


def clear_interrupted(output_dir: Path) -> None:
    """Finish what a killed process had written whole, and remove what it had not."""
    for path in [Path(output_dir), *Path(output_dir).glob("*/")]:
        finish_interrupted(path)
    remove_partial(output_dir)
