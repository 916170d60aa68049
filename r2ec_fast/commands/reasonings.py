"""`r2ec-fast reasonings`: the texts that templates give."""

from __future__ import annotations

from typing import TYPE_CHECKING

from r2ec_fast.utils.atomic_files import check_writable
from r2ec_fast.utils.terminal import say

if TYPE_CHECKING:
    from r2ec_fast.config import RecPOConfig


SHOWN_TEXTS = 5  # of the reasonings that are written


def reasonings(data: str, output_file: str, config: RecPOConfig) -> None:
    """Write the reasonings that `train` makes by the templates of the same settings, as JSONL."""
    from r2ec_fast.data import ReasoningTemplates, RecDataset

    if not isinstance(config.reasonings, ReasoningTemplates):
        raise ValueError(f"reasonings: expected templates, got {config.reasonings!r}")
    check_writable(output_file, "output_file")
    dataset = RecDataset.load(data)
    records = config.reasonings.fill(dataset, config.seed)
    records.write(output_file, dataset, "output_file")
    for place in range(0, len(records), -(-len(records) // SHOWN_TEXTS)):
        say(records.texts[place])
    say(f"wrote {len(records):,} reasonings to {output_file}")
