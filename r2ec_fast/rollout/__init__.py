"""Rollouts: G sampled reasonings for each user prompt."""

from r2ec_fast.rollout.base import RolloutEngine, Rollouts
from r2ec_fast.rollout.engine import TransformersEngine
from r2ec_fast.rollout.score import score_rollouts
from r2ec_fast.rollout.vllm_engine import VLLMEngine

__all__ = ["RolloutEngine", "Rollouts", "TransformersEngine", "VLLMEngine", "score_rollouts"]
