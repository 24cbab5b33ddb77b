"""CLIP score: the cosine similarity of an image and its caption (arXiv 2104.08718, neither scaled nor clipped)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from mlcm_jax.models.clip import CLIPModel
from mlcm_jax.rewards.clip_features import (
    ClipEncoder,
    clip_tokens,
    image_features,
    load_clip_encoder,
    load_clip_tokenizer,
    text_features,
)
from mlcm_jax.rewards.reward_model import RewardModel, RewardModelSpec, check_prompts, unit


class Similarity(nn.Module):
    """Cosine of each image with its own prompt; ``scaled``: times exp(logit_scale), CLIP's temperature."""

    clip: CLIPModel
    scaled: bool

    def __call__(self, pixels: Float[Array, "n h w 3"], tokens: Int[Array, "n t"]) -> Float[Array, " n"]:
        images, texts = self.clip(tokens, pixels)
        cosines = (unit(images) * unit(texts)).sum(axis=-1)
        if not self.scaled:
            return cosines
        return cosines * jnp.exp(self.clip.get_variable("params", "logit_scale").astype(jnp.float32))


class ClipScore(RewardModel):
    """Scores of finished images are computed from the features that metrics take, by the same compiled program."""

    def __call__(self, images: UInt8[np.ndarray, "n H W 3"], prompts: Sequence[str]) -> Float[np.ndarray, " n"]:
        """Cosines, float64; raises UserError as ``RewardModel`` does."""
        check_prompts(images, prompts)
        module: Any = self.module
        encoder = ClipEncoder(module.clip, self.params["clip"], self.preprocessor)
        return cosines(image_features(encoder, images), text_features(encoder, self.tokenize(prompts)))


def cosines(images: Float[np.ndarray, "n p"], texts: Float[np.ndarray, "n p"]) -> Float[np.ndarray, " n"]:
    """Cosine similarity of each image's features with those of its own caption, float64, -1 to 1."""
    images, texts = (np.asarray(f, np.float64) for f in (images, texts))
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    return (images * texts).sum(axis=1) / lengths


def similarity_parts(folder: str | Path, *, scaled: bool, dtype: Any) -> tuple:
    """What a RewardModel of cosines is made of, from a transformers CLIPModel folder with its tokenizer.

    Raises UserError for an unsupported setting, unfit weights, and a missing tokenizer or preprocessor_config.json.
    """
    encoder, tokenizer = load_clip_encoder(folder, dtype=dtype), load_clip_tokenizer(folder)
    tokens = partial(clip_tokens, tokenizer, encoder.module.text)
    return Similarity(encoder.module, scaled), {"clip": encoder.params}, encoder.preprocessor, tokens


def load_clip_score(folder: str | Path, *, dtype: Any = jnp.float32) -> ClipScore:
    """Read a transformers CLIPModel folder with its tokenizer. Raises UserError as ``similarity_parts`` does."""
    return ClipScore(*similarity_parts(folder, scaled=False, dtype=dtype))


CLIP = RewardModelSpec(
    "clip", "CLIP score", "how well image and prompt agree, not how good the image looks", load_clip_score
)
