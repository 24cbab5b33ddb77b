"""PickScore (arXiv 2305.01569): a CLIP fine-tuned on which of two pictures people picked for a prompt."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlcm_jax.hub.pipeline import load_network
from mlcm_jax.models.clip import CLIPModel
from mlcm_jax.rewards.clip_score import load_scorer_tokenizer, scorer_tokens
from mlcm_jax.rewards.preprocess import Preprocessor
from mlcm_jax.rewards.reward_model import Judge, unit


class Similarity(nn.Module):
    """Cosine of each picture with its own prompt; ``scaled``: times exp(logit_scale), CLIP's temperature."""

    clip: CLIPModel
    scaled: bool

    def __call__(self, pixels: Float[Array, "n h w 3"], tokens: Int[Array, "n t"]) -> Float[Array, " n"]:
        images, texts = self.clip(tokens, pixels)
        cosines = (unit(images) * unit(texts)).sum(axis=-1)
        if not self.scaled:
            return cosines
        return cosines * jnp.exp(self.clip.get_variable("params", "logit_scale").astype(jnp.float32))


def load_similarity(folder: str | Path, *, scaled: bool = False, dtype: Any = jnp.float32) -> Judge:
    """Read a transformers CLIPModel folder with its tokenizer: cosines of picture and prompt, ``scaled`` or not.

    Raises UserError for an unsupported setting, unfit weights, and a missing tokenizer or preprocessor_config.json.
    """
    preprocessor, tokenizer = Preprocessor.from_folder(folder), load_scorer_tokenizer(folder)
    network = load_network(folder, "CLIPModel", dtype=dtype)
    clip = cast(CLIPModel, network.module)
    tokens = partial(scorer_tokens, tokenizer, clip.text)
    return Judge(Similarity(clip, scaled), {"clip": network.params}, preprocessor, tokens)


def load_pick_score(folder: str | Path, *, dtype: Any = jnp.float32) -> Judge:
    """Read yuvalkirstain/PickScore_v1: scaled cosines, 20 or so. Raises UserError as ``load_similarity`` does."""
    return load_similarity(folder, scaled=True, dtype=dtype)
