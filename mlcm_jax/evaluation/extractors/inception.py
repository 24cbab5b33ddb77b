"""Inception features, the ones that the Frechet Inception distance compares (arXiv 1706.08500)."""

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from mlcm_jax.evaluation.extractors.base import PHOTOGRAPHS, ExtractorSpec
from mlcm_jax.evaluation.networks.inception import SIDE, InceptionV3, resize_like_torch
from mlcm_jax.hub.load import load_params
from mlcm_jax.hub.pipeline import parameter_shapes
from mlcm_jax.rewards.reward_model import batch_indices
from mlcm_jax.types import Params

CHUNK = 32  # images at a time
# The classifier, and what newer versions of torch count beside a norm's statistics
UNUSED = (re.compile(r"^(fc|AuxLogits)\."), re.compile(r"\.num_batches_tracked$"))


@dataclasses.dataclass(frozen=True)
class InceptionFeatures:
    """Extracts 2048 features an image."""

    module: InceptionV3
    params: Params

    def __call__(self, images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n 2048"]:
        """Features of images of one size, as pytorch-fid computes them; ``CHUNK`` images at a time."""
        batches = batch_indices(len(images), CHUNK)
        features = [np.asarray(_from_uint8(self.module, self.params, images[indices])) for indices in batches]
        return np.concatenate(features)[: len(images)]

    def features(self, params: Params, images: Float[Array, "n H W 3"]) -> Float[Array, "n 2048"]:
        """The same for float images in [-1, 1], as a function of arrays that can be compiled and differentiated."""
        features: Any = self.module.apply({"params": params}, resize_like_torch(images))
        return features


@partial(jax.jit, static_argnames=("module",))
def _from_uint8(module, params, images):
    return module.apply({"params": params}, 2 * resize_like_torch(images.astype(jnp.float32) / 255) - 1)


def load_inception(file: str | Path, *, dtype: Any = jnp.float32) -> InceptionFeatures:
    """Read a .safetensors file with the tensors of pytorch-fid's pt_inception-2015-12-05 file.

    Raises UserError for a pickle, a missing file, and missing, unexpected or misshapen tensors.
    """
    module = InceptionV3(dtype)
    shapes = parameter_shapes(module, jnp.zeros((1, SIDE, SIDE, 3)))
    return InceptionFeatures(module, load_params(shapes, file, ignored=UNUSED))


INCEPTION = ExtractorSpec("inception", load_inception, PHOTOGRAPHS, independent=True)
