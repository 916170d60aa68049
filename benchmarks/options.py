"""What the command line says about the work of every suite."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from machine import model_dtype


@dataclass(frozen=True)
class Options:
    """``tiny``: sizes for a smoke test; ``dtype``: of language models, "" for the device's
    (``machine.model_dtype``; float32 in a tiny size)."""

    device: str = "cpu"
    model: str | None = None
    titles: Path | None = None
    tiny: bool = False
    dtype: str = ""

    @property
    def model_dtype(self) -> torch.dtype:
        if self.dtype:
            return getattr(torch, self.dtype)
        return torch.float32 if self.tiny and self.device == "cpu" else model_dtype(self.device)

    @property
    def size(self) -> str:
        """The published shape of a random model."""
        return "toy" if self.tiny else {"cuda": "Qwen2.5-1.5B"}.get(self.device, "SmolLM2-135M")

    @property
    def label(self) -> str:
        return f"{self.size} random weights" if self.model is None else Path(self.model).name
