"""R2ec: a large recommender model that reasons, with fused kernels and packed training.

Importing the package is cheap; each name below loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r2ec_fast.config import ModelConfig, RecPOConfig
    from r2ec_fast.data import RecDataset, load_interactions, make_splits
    from r2ec_fast.model import R2ecModel
    from r2ec_fast.packing import PackedBatch, pack_histories
    from r2ec_fast.prompts import PromptBuilder, PromptConfig
    from r2ec_fast.serve.recommender import Recommendation, Recommender
    from r2ec_fast.train.trainer import RecPOTrainer

__version__ = "0.1.0"

_HOME = {
    "ModelConfig": "config",
    "PackedBatch": "packing",
    "PromptBuilder": "prompts",
    "PromptConfig": "prompts",
    "R2ecModel": "model",
    "RecDataset": "data",
    "RecPOConfig": "config",
    "RecPOTrainer": "train.trainer",
    "Recommendation": "serve.recommender",
    "Recommender": "serve.recommender",
    "load_interactions": "data",
    "make_splits": "data",
    "pack_histories": "packing",
}

__all__ = [
    "ModelConfig",
    "PackedBatch",
    "PromptBuilder",
    "PromptConfig",
    "R2ecModel",
    "RecDataset",
    "RecPOConfig",
    "RecPOTrainer",
    "Recommendation",
    "Recommender",
    "load_interactions",
    "make_splits",
    "pack_histories",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
