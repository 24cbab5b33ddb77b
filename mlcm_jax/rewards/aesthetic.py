"""LAION's aesthetic predictor (improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE): 1 to 10, or so.

A few linear layers on the unit-length image embeddings of CLIP ViT-L/14; the prompt does not count.
"""

from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlcm_jax.hub.load import load_params
from mlcm_jax.hub.pipeline import load_network, parameter_shapes
from mlcm_jax.hub.preprocess import Preprocessor
from mlcm_jax.models.clip import CLIPModel
from mlcm_jax.rewards.networks.blip import ScoreHead
from mlcm_jax.rewards.reward_model import RewardModel, RewardModelSpec, no_tokens, unit, weights_file

WEIGHTS = "aesthetic.safetensors"


class AestheticPredictor(nn.Module):
    """Image tower and head."""

    clip: CLIPModel
    head: ScoreHead

    def __call__(self, pixels: Float[Array, "n h w 3"], tokens: Int[Array, "n 0"]) -> Float[Array, " n"]:
        return self.head(unit(self.clip.encode_images(pixels)))


def load_aesthetic(folder: str | Path, *, dtype: Any = jnp.float32) -> RewardModel:
    """Read a transformers CLIPModel folder (openai/clip-vit-large-patch14) with ``aesthetic.safetensors`` in it.

    Raises UserError for a missing file, an unsupported setting and unfit weights, such as a head of another CLIP.
    """
    file, preprocessor = weights_file(folder, WEIGHTS), Preprocessor.from_folder(folder)
    network, head = load_network(folder, "CLIPModel", dtype=dtype), ScoreHead()
    clip = cast(CLIPModel, network.module)
    shapes = parameter_shapes(head, jnp.zeros((1, clip.projection_dim)))
    params = {"clip": network.params, "head": load_params(shapes, file)}
    return RewardModel(AestheticPredictor(clip, head), params, preprocessor, no_tokens)


AESTHETIC = RewardModelSpec("aesthetic", "aesthetic score", "looks, 1 to 10, whatever the prompt", load_aesthetic)
