"""How far a quick start has come: in a file, so that one that was stopped goes on where it was, and
in lines for whoever waits."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from r2ec_fast.quickstart.stages import Sizes
from r2ec_fast.utils.atomic_files import check_directory, write_whole
from r2ec_fast.utils.terminal import say

FILE = "quickstart.json"
OUTPUTS = ("data", "warmup", "direct", "recpo", "results.json", "training.png")


class Progress:
    """The finished stages of the quick start in a directory, and what each left to know.

    Raises ValueError, naming output_dir, where the directory holds a finished quick start, one of
    another seed or size, or files of others in the place of its own; OSError where it cannot be
    written.
    """

    def __init__(self, directory: Path, seed: int, sizes: Sizes) -> None:
        self._path = directory / FILE
        check_directory(directory, "output_dir")
        # as JSON gives it back
        self._settings = json.loads(json.dumps({"seed": seed, "sizes": asdict(sizes)}))
        self._stages: dict[str, Any] = {}
        if self._path.is_file():
            self._take_up(json.loads(self._path.read_text()), directory)
        elif found := [name for name in OUTPUTS if (directory / name).exists()]:
            raise ValueError(
                f"output_dir: {directory} holds {', '.join(found)}, which the quick start would "
                "write; choose another output_dir, or move them away"
            )

    def _take_up(self, stored: dict[str, Any], directory: Path) -> None:
        way_out = "choose another output_dir, or move it away"
        if stored["settings"] != self._settings:
            raise ValueError(
                f"output_dir: {directory} holds a quick start of other settings (seed "
                f"{stored['settings']['seed']}); {way_out}"
            )
        if "report" in stored["stages"]:
            raise ValueError(f"output_dir: {directory} holds a finished quick start; {way_out}")
        self._stages = stored["stages"]

    def __contains__(self, stage: str) -> bool:
        return stage in self._stages

    def __getitem__(self, stage: str) -> Any:
        """What the finished ``stage`` left."""
        return self._stages[stage]

    def finish(self, stage: str, value: Any = None) -> None:
        """Write down that ``stage`` is finished, and a JSON ``value``."""
        self._stages[stage] = value
        text = json.dumps({"settings": self._settings, "stages": self._stages}, indent=2)
        write_whole(self._path, text + "\n", "output_dir")


class StepLines:
    """Prints a line now and then about the steps of a stage: a plain one, so that a log file reads
    well.

    Args:
        stage: what the lines begin with.
        total: steps of the whole stage.
        shown: values of a step's record that the lines show.
        every: seconds between two lines.
    """

    def __init__(self, stage: str, total: int, shown: Sequence[str], *, every: float = 5.0) -> None:
        self.stage, self.total, self.shown, self.every = stage, total, shown, every
        self._last = time.perf_counter()

    def __call__(self, record: Mapping[str, float]) -> None:
        """Note a step: its number, "step", and its values."""
        if time.perf_counter() - self._last < self.every:
            return
        self._last = time.perf_counter()
        values = [f"{name.rpartition('/')[2]} {record[name]:.2f}" for name in self.shown]
        with tqdm.external_write_mode():  # a bar on the terminal makes room
            say(f"  {self.stage}: step {record['step']:.0f} of {self.total}, {', '.join(values)}")
