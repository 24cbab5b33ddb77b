"""A distance of two images in the inner features of a CLIP image tower, after LPIPS (arXiv 1801.03924).

It has no learned weights and is no LPIPS: values can be compared with each other only, and for the same tower.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from mlcm_jax.evaluation.metrics.base import ImageMetric
from mlcm_jax.models.clip import CLIPLayer, CLIPVisionEmbeddings
from mlcm_jax.models.layers import LayerNorm
from mlcm_jax.rewards.clip_features import CHUNK, ClipEncoder, tower_pixels
from mlcm_jax.types import Params


def perceptual_distance(
    clip: ClipEncoder, a: UInt8[np.ndarray, "n H W 3"], b: UInt8[np.ndarray, "n H W 3"]
) -> Float[np.ndarray, " n"]:
    """For each pair of images: mean over layers and patches of the squared distance of unit-length features.

    That is arXiv 1801.03924 eq. 1 with all weights equal: 0 for equal images, 4 at most. Raises UserError when the
    images do not come out at the size that the tower takes.
    """
    distances = []
    for start in range(0, len(a), CHUNK):
        indices = np.arange(start, start + CHUNK) % len(a)
        pixels = (tower_pixels(clip, images[indices]) for images in (a, b))
        distances.append(np.asarray(_distance(clip.module, clip.params, *pixels)))
    return np.concatenate(distances)[: len(a)]


@partial(jax.jit, static_argnames=("module",))
def _distance(module, params, a, b):
    n = len(a)
    pairs = layer_features(module, params, jnp.concatenate([a, b]))[:, :, 1:].astype(jnp.float32)  # no class token
    unit = pairs / jnp.linalg.norm(pairs, axis=-1, keepdims=True)
    return jnp.square(unit[:, :n] - unit[:, n:]).sum(axis=-1).mean(axis=(0, 2))


def layer_features(module, params: Params, pixels: Float[Array, "n h w 3"]) -> Float[Array, "layers n tokens d"]:
    """What each layer of a CLIPModel's image tower hands on, the class token first."""
    config, dtype, tower = module.vision, module.dtype, params["vision_model"]
    x = CLIPVisionEmbeddings(config, dtype).apply({"params": tower["embeddings"]}, pixels)
    x = LayerNorm(config.layer_norm_eps, dtype).apply({"params": tower["pre_layrnorm"]}, x)

    def advance(x, layer):
        (x, _), _ = CLIPLayer(config, dtype).apply({"params": layer}, (x, x), None)
        return x, x

    return jax.lax.scan(advance, x, tower["encoder"]["layers"])[1]


PERCEPTUAL_DISTANCE = ImageMetric(
    "perceptual_distance",
    "perceptual distance",
    "lower",
    4,
    perceptual_distance,
    needs=("clip", "images", "baseline_images"),
)
