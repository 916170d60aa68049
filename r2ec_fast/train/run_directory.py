"""The directory of a run: its checkpoints are saved, taken up again and pruned here."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from r2ec_fast.eval.metrics import BEST_METRIC
from r2ec_fast.train import distributed
from r2ec_fast.train.checkpoint import (
    clear_interrupted,
    keep_best,
    load_checkpoint,
    load_wanted,
    prune_checkpoints,
    refuse_results,
    save_checkpoint,
    set_aside,
)
from r2ec_fast.train.fault_tolerance import together
from r2ec_fast.utils.atomic_files import check_directory

if TYPE_CHECKING:
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_kernels import ItemIndex

log = logging.getLogger(__name__)


class RunDirectory:
    """The checkpoints of one run below ``path``, of which the newest ``keep`` stay.

    Every process calls each method; the main one writes. Raises OSError, naming output_dir, where
    ``path`` cannot be written.
    """

    def __init__(self, path: Path, keep: int) -> None:
        check_directory(path, "output_dir")
        self.path, self.keep = path, keep
        self.run = uuid.uuid4().hex  # of the main process

    @property
    def _writes(self) -> bool:
        return distributed.world()[0] == 0

    def begin(self) -> None:
        """Start a new run. Raises ValueError where the directory holds results of another one."""
        if self._writes:
            clear_interrupted(self.path)
        with together("output_dir"):
            if self._writes:
                refuse_results(self.path)

    def resume(
        self,
        wanted: str,
        model: R2ecModel,
        optimizer: torch.optim.Optimizer,
        settings: Mapping[str, Any],
    ) -> dict:
        """Put the checkpoint ``wanted`` ("latest", or a directory) back and go on with its run;
        returns its state.

        Later checkpoints are renamed, and settings that changed are told. Raises CheckpointError
        for one that is damaged or of another model, ValueError for a directory with another run.
        """
        if self._writes:
            clear_interrupted(self.path)
        state = load_wanted(wanted, self.path, model, optimizer, settings)
        self.run = state.get("run") or self.run  # checkpoints of 0.1.0 name none
        with together("output_dir"):
            if self._writes:
                refuse_results(self.path, self.run)
                if moved := set_aside(self.path, state["step"]):
                    log.warning("later checkpoints are kept as %s", ", ".join(moved))
        _say_changed_settings(state["config"], settings)
        return state

    def best_so_far(self, best: dict[str, float], wanted: str) -> dict[str, float]:
        """``best``, the metrics of the best checkpoint of a run resumed from ``wanted``; empty,
        with a warning, where that checkpoint is no longer there."""
        kept = False
        with together("best checkpoint"):
            if best and self._writes:
                kept = keep_best(best, wanted, self.path)
        if not best or distributed.any_(kept):
            return best
        log.warning(
            "the best checkpoint so far (%s %.4g) is no longer there: the best is chosen anew from "
            "here on",
            BEST_METRIC,
            best[BEST_METRIC],
        )
        return {}

    def save(
        self,
        name: str,
        tensors: Mapping[str, dict[str, torch.Tensor]],
        index: ItemIndex | None,
        state: dict,
    ) -> None:
        """Write the checkpoint ``name`` of the run, whole or not at all, and prune older ones."""
        with together("checkpoint"):
            if self._writes:
                save_checkpoint(self.path / name, tensors, index, {**state, "run": self.run})
                prune_checkpoints(self.path, self.keep, self.run)

    def load_best(self, model: R2ecModel) -> None:
        """Put the best checkpoint back into ``model``."""
        load_checkpoint(self.path / "best", model)


def _say_changed_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in [name for name in now if name in saved and saved[name] != now[name]]:
        if name not in ("output_dir", "resume_from_checkpoint"):
            log.info("%s: %s from here on (%s before)", name, now[name], saved[name])
