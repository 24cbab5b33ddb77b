"""T2I-Adapters against diffusers' T2IAdapter in float32, alone and beside a UNet."""

import math

import diffusers
import jax
import numpy as np
import pytest
import torch
from control_cases import CONFIGS as UNETS
from control_cases import CROSS_DOWN, CROSS_UP, UP_BLOCKS, for_torch, inputs
from torch_weights import assert_close, channels_first, channels_last, named_shapes, randomise, through_files

from mlcm_jax.errors import UserError
from mlcm_jax.hub.network import network_shapes
from mlcm_jax.models.t2i_adapter import T2IAdapter

CONFIGS = {
    "full": {"channels": (8, 16, 16), "num_res_blocks": 2, "downscale_factor": 4},
    "full xl": {
        "adapter_type": "full_adapter_xl",
        "channels": (8, 16, 32, 32),
        "num_res_blocks": 1,
        "downscale_factor": 4,
    },
    "light, grey": {
        "adapter_type": "light_adapter",
        "in_channels": 1,
        "channels": (8, 16),
        "num_res_blocks": 2,
        "downscale_factor": 2,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_diffusers(name, tmp_path):
    config = CONFIGS[name]
    model = randomise(diffusers.T2IAdapter(**config))
    network = through_files(model, tmp_path)
    side = config["downscale_factor"]  # 5 x 6 places: a mean of 2 x 2 meets the edge
    image = np.random.default_rng(0).random((2, 5 * side, 6 * side, config.get("in_channels", 3)), np.float32)
    ours = jax.jit(network.module.apply)({"params": network.params}, image)
    with torch.no_grad():
        theirs = model(channels_first(image))
    assert len(ours) == len(theirs)
    for mine, reference in zip(ours, theirs, strict=True):
        assert_close(mine, channels_last(reference))


# The sizes of TencentARC's, written down by hand
FULL_SIZE = {
    "t2i-adapter-canny-sdxl-1.0": ({"adapter_type": "full_adapter_xl", "downscale_factor": 16}, 79.0),
    "t2iadapter_depth_sd15v2": ({}, 77.4),
    "t2iadapter_color_sd14v1": (
        {"adapter_type": "light_adapter", "channels": [320, 640, 1280], "num_res_blocks": 4},
        18.7,
    ),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_names_and_shapes_are_torch(name):
    config, millions = FULL_SIZE[name]
    with torch.device("meta"):
        model = diffusers.T2IAdapter(**config)
    ours = named_shapes(network_shapes(T2IAdapter.from_config(config), config))
    assert ours == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sum(map(math.prod, ours.values())) / 1e6 == pytest.approx(millions, rel=5e-3)


SDXL = {**UNETS["no attention"], "block_out_channels": (8, 16), "mid_block_type": "UNetMidBlock2D"}
SDXL |= {"down_block_types": ("DownBlock2D", CROSS_DOWN), "transformer_layers_per_block": 1, "attention_head_dim": 2}
# a UNet, its blocks on the way up, and of each feature the latents along a place and the width
PLACES = {
    "a block without attention, one with, the middle": (SDXL, (CROSS_UP, "UpBlock2D"), ((2, 8), (2, 16), (2, 16))),
    "with attention, without": (UNETS["sd15"], UP_BLOCKS["sd15"], ((1, 8), (2, 16))),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_unet_with_features_is_diffusers(name, tmp_path):
    unet_config, up_blocks, places = PLACES[name]
    config = {k: v for k, v in unet_config.items() if not k.startswith(("conditioning", "controlnet"))}
    unet = randomise(diffusers.UNet2DConditionModel(**config, up_block_types=up_blocks, sample_size=8))
    network = through_files(unet, tmp_path)
    given, _ = inputs(unet_config)
    n, height, width, _ = given[0].shape
    rng = np.random.default_rng(1)
    features = [rng.standard_normal((n, height // s, width // s, c), np.float32) for s, c in places]
    with torch.no_grad():
        plain = channels_last(unet(**for_torch(given)).sample)
        added = [channels_first(feature) for feature in features]
        theirs = channels_last(unet(**for_torch(given), down_intrablock_additional_residuals=added).sample)
    ours = jax.jit(network.module.apply)({"params": network.params}, *given, features=features)
    assert_close(ours, theirs)
    assert np.abs(plain - theirs).max() > 0.1 * np.abs(theirs).max(), "they change the image"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"adapter_type": "full"}, "adapter_type"),
        ({"in_channels": 4}, "in_channels"),
        ({"adapter_type": "full_adapter_xl", "channels": [8, 8, 8, 16]}, "channels"),
        ({"adapter_type": "light_adapter", "channels": [3]}, "channels"),
        ({"downscale_factor": 0}, "downscale_factor"),
    ],
)
def test_unsupported_value_is_named(settings, key):
    with pytest.raises(UserError) as error:
        T2IAdapter.from_config(settings)
    assert f"{key}=" in str(error.value) and "T2IAdapter" in str(error.value)
