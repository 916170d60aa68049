"""`r2ec-fast quickstart`; its docstring is the help of its settings."""

from __future__ import annotations


def quickstart(output_dir: str = "runs/quickstart", seed: int = 42) -> None:
    """Train and evaluate a small recommender on a generated catalog, offline, on the CPU.

    Args:
        output_dir: where models, metrics and the picture are written.
        seed: of the catalog, the model and the training.
    """
    from r2ec_fast.quickstart.pipeline import run

    run(output_dir, seed=seed)
