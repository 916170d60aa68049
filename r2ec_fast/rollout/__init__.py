"""Rollouts: G sampled reasonings for each user prompt."""

from r2ec_fast.rollout.base import RolloutEngine, Rollouts
from r2ec_fast.rollout.engine import TransformersEngine

__all__ = ["RolloutEngine", "Rollouts", "TransformersEngine"]
