"""What a run writes while it trains: metrics.jsonl, samples.jsonl, and to its tracker."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

from r2ec_fast.utils.atomic_files import put_aside, write_whole

if TYPE_CHECKING:
    from accelerate import Accelerator

    from r2ec_fast.config import RecPOConfig

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"

log = logging.getLogger(__name__)


class RunLog:
    """The log of a run in ``config.output_dir``; only the main process writes."""

    def __init__(self, config: RecPOConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.metrics_file = Path(config.output_dir) / METRICS_FILE
        self.samples_file = Path(config.output_dir) / SAMPLES_FILE

    def open(self, step: int | None) -> None:
        """Begin anew (None), with an earlier run's files put aside, or go on after ``step``: later
        lines are dropped, because the resumed run writes them again."""
        if self.config.report_to != "none":
            settings = {k: v for k, v in self.config.to_dict().items() if v is not None}
            self.accelerator.init_trackers("r2ec", config=settings)
        if not self.accelerator.is_main_process:
            return
        for path in (self.metrics_file, self.samples_file):
            if step is not None and path.is_file():
                _truncate(path, step)
            elif path.exists():
                log.warning("%s of an earlier run is kept as %s", path.name, put_aside(path).name)

    def write(self, record: dict[str, float], shown: str | None = None) -> None:
        """One line of metrics; ``record["step"]`` is its step. ``shown``: what the log says instead
        of the values."""
        if not self.accelerator.is_main_process:
            return
        _append(self.metrics_file, [record])
        values = [f"{k} {v:.4g}" for k, v in record.items() if not k.endswith("/se")]
        log.info(" | ".join(values) if shown is None else shown)
        if self.config.report_to != "none":
            tracked = {k: v for k, v in record.items() if k != "step"}
            self.accelerator.log(tracked, step=int(record["step"]))

    def write_samples(self, records: list[dict]) -> None:
        """Reasonings with their "step", one line each."""
        if self.accelerator.is_main_process:
            _append(self.samples_file, records)


def _append(path: Path, records: list[dict]) -> None:
    with open(path, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def _truncate(path: Path, step: int) -> None:
    kept = [line for line in path.read_text().splitlines() if _step_in(line) <= step]
    write_whole(path, "".join(f"{line}\n" for line in kept), "output_dir")


def _step_in(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # the line a killed process was writing
        return math.inf
