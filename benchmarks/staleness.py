"""What the age of the item table's rows adds to the rewards, at every step of the quick start.

    r2ec-fast quickstart --output_dir runs/quickstart
    python benchmarks/staleness.py --quickstart runs/quickstart --refresh_steps 25

RecPO of the quick start is done again from its warm-up, as it is and with `fresh_targets` (the
paper's order). After each step its reasonings are scored twice: against the table as the next step
would find it, and against one that is encoded anew. The difference of the mean rewards is the bias.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from r2ec_fast import R2ecModel, RecDataset, RecPOTrainer
from r2ec_fast.quickstart.stages import Sizes, recpo_trainer
from r2ec_fast.report.plots import read_log
from r2ec_fast.train.staleness import staleness_bias

PARTS = 5


class Measured(RecPOTrainer):
    """Measures the bias after every step and leaves the table as it was."""

    def _train_step(self, step: int) -> dict[str, float]:
        record = super()._train_step(step)
        experience, fresh = self.refresh.latest
        rows, ages = self.model.item_table.clone(), self.table.written_at.copy()
        refreshed_at = self.table.refreshed_at
        bias = staleness_bias(
            experience,
            step,
            update=self.update,
            table=self.table,
            fresh=fresh,
            refresh=lambda: self.table.refresh(step),
        )
        self.model.set_items(rows, scan="none")
        self.table.written_at, self.table.refreshed_at = ages, refreshed_at
        return record | {"bias": bias}


def measure(quickstart: Path, *, refresh_steps: int, fresh_targets: bool) -> dict[str, list[float]]:
    """ "reward" and "bias" of every step."""
    settings = json.loads((quickstart / "quickstart.json").read_text())["settings"]
    sizes, seed = Sizes(), settings["seed"]
    dataset = RecDataset.load(quickstart / "data")
    with TemporaryDirectory() as folder:
        output = Path(folder)
        (output / "warmup").symlink_to((quickstart / "warmup").resolve())
        world = replace(sizes.world, seed=seed)
        own = recpo_trainer(world, dataset, sizes, seed, output)
        config = replace(own.config, refresh_steps=refresh_steps, fresh_targets=fresh_targets)
        Measured(R2ecModel.from_pretrained(output / "warmup"), dataset, config).train()
        log = [record for record in read_log(config.output_dir) if "reward" in record]
    return {name: [record[name] for record in log] for name in ("reward", "bias")}


def main() -> int:
    """Print one line for each order of writing; `--output_file` gets every step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quickstart", type=Path, required=True, help="of a finished quick start")
    parser.add_argument("--refresh_steps", type=int, default=5)
    parser.add_argument("--output_file", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("r2ec_fast").setLevel(logging.ERROR)
    found = {}
    for name, fresh in (("rows of one age", False), ("fresh targets", True)):
        steps = measure(chosen.quickstart, refresh_steps=chosen.refresh_steps, fresh_targets=fresh)
        found[name] = steps
        parts = {
            key: " ".join(f"{part.mean():.4f}" for part in np.array_split(values, PARTS))
            for key, values in steps.items()
        }
        worst = max(steps["bias"], key=abs)
        print(
            f"{name}, refresh every {chosen.refresh_steps} steps: reward by fifths "
            f"{parts['reward']}, bias by fifths {parts['bias']}, largest {worst:.4f}",
            flush=True,
        )
    if chosen.output_file is not None:
        chosen.output_file.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
