"""Rollouts: G sampled reasonings for each user prompt."""

from r2ec_fast.rollout.base import RolloutEngine, Rollouts
from r2ec_fast.rollout.score import score_rollouts
from r2ec_fast.rollout.transformers_engine import TransformersEngine
from r2ec_fast.rollout.vllm.engine import VLLMEngine
from r2ec_fast.rollout.vllm.server import RolloutServerError, VLLMServerEngine

__all__ = [
    "RolloutEngine",
    "RolloutServerError",
    "Rollouts",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServerEngine",
    "score_rollouts",
]
