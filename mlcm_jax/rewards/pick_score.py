"""PickScore (arXiv 2305.01569): a CLIP fine-tuned on which of two images people picked for a prompt."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mlcm_jax.rewards.clip_score import similarity_parts
from mlcm_jax.rewards.reward_model import RewardModel, RewardModelSpec


def load_pick_score(folder: str | Path, *, dtype: Any = jnp.float32) -> RewardModel:
    """Read yuvalkirstain/PickScore_v1: scaled cosines, 20 or so. Raises UserError as ``similarity_parts`` does."""
    return RewardModel(*similarity_parts(folder, scaled=True, dtype=dtype))


PICK_SCORE = RewardModelSpec("pick_score", "PickScore", "preference of people for the prompt", load_pick_score)
