"""A pipeline in shapes only, and compiles that hurry."""

import dataclasses

import jax
import pytest

from mlcm_jax.hub.pipeline import Network, network_shapes, read_architecture
from mlcm_jax.models.unet import UNet2DConditionModel

UNET = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "attention_head_dim": [4],
    "norm_num_groups": 8,
    "sample_size": 8,
    "use_linear_projection": True,
    "transformer_layers_per_block": [1],
    "cross_attention_dim": 64,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}


@pytest.fixture
def quick_compiles():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def architecture(sdxl_folder):
    """The tiny pipeline around a UNet of one level, in shapes only."""
    module = UNet2DConditionModel.from_config(UNET)
    return dataclasses.replace(read_architecture(sdxl_folder), unet=Network(module, network_shapes(module, UNET), UNET))
