"""`r2ec-fast train`; its settings are those of config."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from r2ec_fast.utils.terminal import say

if TYPE_CHECKING:
    from r2ec_fast.config import ModelConfig, RecPOConfig
    from r2ec_fast.data import RecDataset
    from r2ec_fast.model.r2ec import R2ecModel


def train(data: str, model: ModelConfig, config: RecPOConfig) -> dict[str, float]:
    """Train a model on a prepared data set; returns and prints its validation metrics."""
    from r2ec_fast.data import RecDataset
    from r2ec_fast.train.trainer import RecPOTrainer

    dataset = RecDataset.load(data)
    trainer = RecPOTrainer(_model_to_train(model, dataset), dataset, config)
    metrics = trainer.train()
    for key, value in metrics.items():
        say(f"{key}: {value:.4f}")
    say(f"wrote {config.output_dir}")
    return metrics


def _model_to_train(config: ModelConfig, dataset: RecDataset) -> R2ecModel:
    """The model with the configured settings. One left at its default stays as a model that was
    trained before has it; the category's words are then the data set's."""
    from r2ec_fast.config import ModelConfig
    from r2ec_fast.model.liger import apply_liger_kernel
    from r2ec_fast.model.loading import load_model

    model = load_model(config.name_or_path, dtype=config.dtype, gguf_file=config.gguf_file)
    if config.use_liger_kernel:
        apply_liger_kernel(model.backbone)
    usual = ModelConfig()
    if config.similarity != usual.similarity:
        model.similarity = config.similarity
    if config.item_temperature != usual.item_temperature:
        model.temperature = config.item_temperature
    if config.prompts != usual.prompts:
        model.prompts = config.prompts
    words = dataset.settings.get("prompt", {})
    if words and model.prompts.category == usual.prompts.category:
        model.prompts = dataclasses.replace(model.prompts, **words)
    model.index = None  # its rows may be another catalog's
    return model
