"""A LoRA of the tiny SDXL UNet, for the tests of LoRA files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mlcm_jax.hub.pipeline import load_network, network_shapes
from mlcm_jax.models import lora

RANK, ALPHA = 4, 10.0


@pytest.fixture(scope="module")
def unet(sdxl_folder):
    return load_network(sdxl_folder / "unet", "UNet2DConditionModel")


@pytest.fixture(scope="module")
def shapes(unet):
    return network_shapes(unet.module, unet.config)


@pytest.fixture(scope="module")
def tree(shapes):
    """A scaled LoRA with random factors on all default targets, alpha other than rank."""
    flat = traverse_util.flatten_dict(lora.init(jax.random.key(0), shapes, RANK))
    rng = np.random.default_rng(0)
    flat = {k: jnp.asarray(rng.normal(size=v.shape) * 0.1, jnp.float32) for k, v in flat.items()}
    return lora.scaled(traverse_util.unflatten_dict(flat), ALPHA, RANK)
