"""Image features of a scorer: a folder of transformers' CLIPModel (arXiv 2103.00020)."""

import dataclasses
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import Network, load_network
from mlcm_jax.rewards.preprocess import Preprocessor

CHUNK = 64  # images that are encoded at a time


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A CLIPModel and what its images go through first."""

    network: Network
    preprocessor: Preprocessor


def load_scorer(folder: str | Path, *, dtype: Any = jnp.float32) -> Scorer:
    """Read config.json, weights and preprocessor_config.json; ``dtype`` is the compute dtype.

    Raises UserError for an unsupported setting and for unfit weights.
    """
    return Scorer(load_network(folder, "CLIPModel", dtype=dtype), Preprocessor.from_folder(folder))


# For programs that put one scorer to several uses
load_scorer_once = lru_cache(maxsize=2)(load_scorer)


def tower_pixels(scorer: Scorer, images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n h w 3"]:
    """What the image tower takes; raises UserError when the images do not come out at its size."""
    pixels, side = scorer.preprocessor(images), scorer.network.module.vision.image_size
    if pixels.shape[1:3] != (side, side):
        raise UserError(
            f"The images come out at {pixels.shape[1]} x {pixels.shape[2]} pixels, but the scorer takes {side} x "
            f"{side}: give square images, or a preprocessor_config.json that crops them."
        )
    return pixels


@partial(jax.jit, static_argnames=("module",))
def _encode(module, params, pixels):
    return module.apply({"params": params}, pixels, method="encode_images").astype(jnp.float32)


def image_features(scorer: Scorer, images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n p"]:
    """Projected image embeddings, float32, not normalised; compiled once, for ``CHUNK`` images at a time.

    These are the features of CLIP-FID (arXiv 2203.06026); scale the rows to length one for cosine similarities.
    Raises UserError when the images do not come out at the size that the tower takes.
    """
    features = []
    for start in range(0, len(images), CHUNK):
        pixels = tower_pixels(scorer, images[start : start + CHUNK])
        padded = np.pad(pixels, [(0, CHUNK - len(pixels)), (0, 0), (0, 0), (0, 0)])
        encoded = _encode(scorer.network.module, scorer.network.params, padded)
        features.append(np.asarray(encoded)[: len(pixels)])
    return np.concatenate(features)
