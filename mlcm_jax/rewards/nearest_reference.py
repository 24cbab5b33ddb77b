"""How near an image comes to reference images in the features of an ImageNet classifier.

It shares nothing with a CLIP: a held-out reward model for a preference loss that learns from one.
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
from mlcm_jax.rewards.reward_model import RewardModel, RewardModelSpec, no_tokens, weights_file

REFERENCE_FILE, TENSOR = "reference.safetensors", "features"


class NearestReference(nn.Module):
    """Minus the squared distance of an image's features to those of the nearest reference image, 0 at best.

    Its unit is the mean squared distance of two reference images.
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


def load_nearest_reference(folder: str | Path, *, dtype: Any = jnp.float32) -> RewardModel:
    """Read a folder that launch/convert_efficientnet.py wrote with --reference.

    Raises UserError for a missing file and as ``load_efficientnet`` does.
    """
    network = load_efficientnet(folder, dtype=dtype).network
    file = weights_file(folder, REFERENCE_FILE)
    reader = open_weights(file)
    if list(reader.names()) != [TENSOR]:
        raise UserError(f"{file} does not hold the features of reference images: write it again with --reference.")
    module = NearestReference(network.module, *reader.shape(TENSOR))
    params = {"network": network.params, "reference": jnp.asarray(reader.read(TENSOR))}
    return RewardModel(module, params, PREPROCESSOR, no_tokens)


def save_reference(batches: Iterable[UInt8[np.ndarray, "n H W 3"]], folder: str | Path) -> int:
    """Write the features of reference images into the network's folder; returns how many there are."""
    extract = load_efficientnet(folder)
    features = np.concatenate([extract(images) for images in batches])
    entry = Entry([TENSOR], features.shape, features.dtype, lambda: [features])
    write_safetensors([entry], Path(folder) / REFERENCE_FILE)
    return len(features)


NEAREST_REFERENCE = RewardModelSpec(
    "efficientnet",
    "nearness to reference images",
    "minus the squared distance to the nearest one, in units of their own mean squared distance",
    load_nearest_reference,
)
