"""R2ec: a large recommender model that reasons, with fused kernels and packed training.

Importing the package is cheap; each name below loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors see
    from r2ec_fast.config import ModelConfig as ModelConfig
    from r2ec_fast.config import RecPOConfig as RecPOConfig
    from r2ec_fast.data import RecDataset as RecDataset
    from r2ec_fast.data import load_interactions as load_interactions
    from r2ec_fast.data import make_splits as make_splits
    from r2ec_fast.model import R2ecModel as R2ecModel
    from r2ec_fast.packing import PackedBatch as PackedBatch
    from r2ec_fast.packing import pack_histories as pack_histories
    from r2ec_fast.prompts import PromptBuilder as PromptBuilder
    from r2ec_fast.prompts import PromptConfig as PromptConfig
    from r2ec_fast.serve.recommender import Recommendation as Recommendation
    from r2ec_fast.serve.recommender import Recommender as Recommender
    from r2ec_fast.train.trainer import RecPOTrainer as RecPOTrainer
    from r2ec_kernels import __version__ as __version__

_EXPORTS = {
    "config": ("ModelConfig", "RecPOConfig"),
    "data": ("RecDataset", "load_interactions", "make_splits"),
    "model": ("R2ecModel",),
    "packing": ("PackedBatch", "pack_histories"),
    "prompts": ("PromptBuilder", "PromptConfig"),
    "serve.recommender": ("Recommendation", "Recommender"),
    "train.trainer": ("RecPOTrainer",),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from r2ec_kernels import __version__

        return __version__
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
