"""Features of EfficientNet-Lite, a classifier of ImageNet's photographs (arXiv 1905.11946).

It was not trained on captions, nor on the images of examples/emoji.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from mlcm_jax.errors import UserError
from mlcm_jax.hub.load import load_params, read_json
from mlcm_jax.hub.network import Network, parameter_shapes
from mlcm_jax.hub.preprocess import Preprocessor
from mlcm_jax.rewards.networks.efficientnet_lite import EfficientNetLite
from mlcm_jax.rewards.reward_model import batch_indices
from mlcm_jax.types import Params

CHUNK = 32  # images at a time
SIDE = 192  # pixels; a multiple of 32, so that every halving is even
PREPROCESSOR = Preprocessor(
    resize=(SIDE, SIDE),
    crop=None,
    resample=int(Image.Resampling.BICUBIC),
    scale=1.0,
    mean=(127.0, 127.0, 127.0),
    std=(128.0, 128.0, 128.0),
)


@dataclasses.dataclass(frozen=True)
class EfficientNetFeatures:
    """Extracts 1280 features an image: the last ones, averaged over all places."""

    network: Network

    def __call__(self, images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n 1280"]:
        """Features of images of one size, resized to ``SIDE`` (PIL's bicubic); ``CHUNK`` images at a time."""
        module, params = self.network.module, self.network.params
        batches = batch_indices(len(images), CHUNK)
        features = [np.asarray(_encode(module, params, PREPROCESSOR(images[indices]))) for indices in batches]
        return np.concatenate(features)[: len(images)]

    def features(self, params: Params, images: Float[Array, "n H W 3"]) -> Float[Array, "n 1280"]:
        """The same for float images in [-1, 1], as a function of arrays that can be compiled and differentiated."""
        features: Any = self.network.module.apply({"params": params}, PREPROCESSOR.differentiable(images))
        return features


@partial(jax.jit, static_argnames=("module",))
def _encode(module, params, pixels):
    return module.apply({"params": params}, pixels)


def load_efficientnet(folder: str | Path, *, dtype: Any = jnp.float32) -> EfficientNetFeatures:
    """Read a folder that launch/convert_efficientnet.py wrote.

    Raises UserError for a folder that does not exist, an unsupported setting and unfit weights.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder} does not exist: launch/convert_efficientnet.py makes it, see docs/evaluate.md.")
    config = read_json(Path(folder) / "config.json")
    module = EfficientNetLite.from_config(config, dtype=dtype)
    params = load_params(parameter_shapes(module, jnp.zeros((1, SIDE, SIDE, 3))), folder)
    return EfficientNetFeatures(Network(module, params, config))
