"""A judge of looks: how near a picture comes to reference pictures in the features of an ImageNet classifier.

It shares nothing with a CLIP, so it can guard a preference loss that learns from one.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from mlcm_jax.errors import UserError
from mlcm_jax.hub.save import Entry, write_safetensors
from mlcm_jax.hub.tensor_reader import open_weights
from mlcm_jax.rewards.efficientnet_features import PREPROCESSOR, load_efficientnet
from mlcm_jax.rewards.reward_model import Judge, judge_file, no_tokens

REFERENCE_FILE, TENSOR = "reference.safetensors", "features"


class NearestReference(nn.Module):
    """Minus the squared distance of a picture's features to those of the nearest reference picture, 0 at best.

    Its unit is the mean squared distance of two reference pictures.
    """

    network: nn.Module
    num_reference: int
    width: int

    @nn.compact
    def __call__(self, pixels: Float[Array, "n h w 3"], tokens: Int[Array, "n t"]) -> Float[Array, " n"]:
        shape = (self.num_reference, self.width)
        reference = self.param("reference", nn.initializers.zeros, shape).astype(jnp.float32)
        features: Any = self.network(pixels)
        squared = jnp.square(features[:, None] - reference).sum(axis=-1)
        return -squared.min(axis=1) / (2 * reference.var(axis=0).sum())


def load_nearest_reference(folder: str | Path, *, dtype: Any = jnp.float32) -> Judge:
    """Read a folder that launch/convert_efficientnet.py wrote with --reference.

    Raises UserError for a missing file and as ``load_efficientnet`` does.
    """
    network = load_efficientnet(folder, dtype=dtype).network
    file = judge_file(folder, REFERENCE_FILE)
    reader = open_weights(file)
    if list(reader.names()) != [TENSOR]:
        raise UserError(f"{file} does not hold the features of reference pictures: write it again with --reference.")
    module = NearestReference(network.module, *reader.shape(TENSOR))
    params = {"network": network.params, "reference": jnp.asarray(reader.read(TENSOR))}
    return Judge(module, params, PREPROCESSOR, no_tokens)


def save_reference(batches: Iterable[UInt8[np.ndarray, "n H W 3"]], folder: str | Path) -> int:
    """Write the features of reference pictures into the network's folder; returns how many there are."""
    extract = load_efficientnet(folder)
    features = np.concatenate([extract(images) for images in batches])
    entry = Entry([TENSOR], features.shape, features.dtype, lambda: [features])
    write_safetensors([entry], Path(folder) / REFERENCE_FILE)
    return len(features)
