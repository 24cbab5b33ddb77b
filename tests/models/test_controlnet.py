"""ControlNets against diffusers' ControlNetModel in float32, alone and beside a UNet."""

import diffusers
import jax
import numpy as np
import pytest
import torch
from torch_weights import assert_close, channels_first, channels_last, randomise, through_files

from mlcm_jax.errors import UserError
from mlcm_jax.models.controlnet import Controlled, ControlledUNet, ControlNetModel, copied_from_unet
from mlcm_jax.types import TextConditioning

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
XL = {
    "block_out_channels": (8, 16, 32),
    "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 10 + 6 * 6,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "conditioning_embedding_out_channels": (4, 8),
}
CONFIGS = {
    "sdxl": XL,
    "sd15": {
        "block_out_channels": (8, 16),
        "down_block_types": (CROSS_DOWN, "DownBlock2D"),
        "layers_per_block": 2,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "conditioning_embedding_out_channels": (4, 8, 12, 16),
        "controlnet_conditioning_channel_order": "bgr",
    },
    # as diffusers/controlnet-canny-sdxl-1.0-small: transformers without a block
    "small": {**XL, "transformer_layers_per_block": (0, 0, 0)},
    "no attention": {**XL, "down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"},
}
UP_BLOCKS = {"sdxl": (CROSS_UP, CROSS_UP, "UpBlock2D"), "sd15": ("UpBlock2D", CROSS_UP)}


def inputs(config):
    """(sample, timesteps, conditioning), and an image; both are wider than high."""
    rng, side = np.random.default_rng(0), 2 ** (len(config["block_out_channels"]) - 1)
    pixels = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    conditioning = TextConditioning(
        hidden_states=rng.standard_normal((2, 5, 12), np.float32),
        pooled=rng.standard_normal((2, 10), np.float32),
        time_ids=np.array([[64, 48, 0, 8, 64, 64], [1024, 768, 16, 0, 1024, 1024]], np.float32),
    )
    sample = rng.standard_normal((2, 2 * side, 4 * side, 4), np.float32)
    image = rng.random((2, 2 * side * pixels, 4 * side * pixels, 3), np.float32)
    return (sample, np.array([999, 261]), conditioning), image


def for_torch(given):
    """The same inputs as diffusers' networks take them."""
    sample, timesteps, conditioning = given
    added = {"text_embeds": torch.from_numpy(conditioning.pooled), "time_ids": torch.from_numpy(conditioning.time_ids)}
    states = torch.from_numpy(conditioning.hidden_states)
    return {
        "sample": channels_first(sample),
        "timestep": torch.from_numpy(timesteps),
        "encoder_hidden_states": states,
        "added_cond_kwargs": added,
    }


@torch.no_grad()
def torch_residuals(model, given, image, scale=1.0):
    output = model(**for_torch(given), controlnet_cond=channels_first(image), conditioning_scale=scale)
    return output.down_block_res_samples, output.mid_block_res_sample


@pytest.mark.parametrize("name", CONFIGS)
def test_residuals_are_diffusers(name, tmp_path):
    model = randomise(diffusers.ControlNetModel(**CONFIGS[name]))
    network = through_files(model, tmp_path)
    given, image = inputs(CONFIGS[name])
    ours = jax.jit(network.module.apply)({"params": network.params}, *given, image)
    down, mid = torch_residuals(model, given, image)
    assert len(ours.down) == len(down)
    for mine, theirs in zip((*ours.down, ours.mid), (*down, mid), strict=True):
        assert np.abs(channels_last(theirs)).max() > 0.1
        assert_close(mine, channels_last(theirs))


@pytest.mark.parametrize("name", UP_BLOCKS)
def test_a_unet_with_two_of_them_is_diffusers(name, tmp_path):
    config = {k: v for k, v in CONFIGS[name].items() if not k.startswith(("conditioning", "controlnet"))}
    unet = randomise(diffusers.UNet2DConditionModel(**config, up_block_types=UP_BLOCKS[name], sample_size=8))
    models = [randomise(diffusers.ControlNetModel(**CONFIGS[name]), seed) for seed in (1, 2)]
    given, image = inputs(CONFIGS[name])
    images, scales = (image, image[::-1].copy()), (0.5, 1.5)
    found = [torch_residuals(m, given, i, s) for m, i, s in zip(models, images, scales, strict=True)]
    with torch.no_grad():
        theirs = unet(
            **for_torch(given),
            down_block_additional_residuals=[a + b for a, b in zip(*(down for down, _ in found), strict=True)],
            mid_block_additional_residual=sum(mid for _, mid in found),
        ).sample
    first, *rest = (through_files(m, tmp_path / str(i)) for i, m in enumerate([unet, *models]))
    module = ControlledUNet(first.module, tuple(n.module for n in rest))
    params = {"unet": first.params} | {f"controlnets_{i}": n.params for i, n in enumerate(rest)}
    sample, timesteps, text = given
    conditioning = Controlled(text, images, tuple(np.full(2, s, np.float32) for s in scales))
    ours = jax.jit(module.apply)({"params": params}, sample, timesteps, conditioning)
    assert_close(ours, channels_last(theirs))
    plain = jax.jit(first.module.apply)({"params": first.params}, *given)
    assert np.abs(plain - ours).max() > 0.1 * np.abs(ours).max(), "it changes the image"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_pool_conditions", True),
        ("controlnet_conditioning_channel_order", "grb"),
        ("conditioning_channels", 1),
        ("transformer_layers_per_block", [1, -1, 1]),
        ("layers_per_block", [1, 1, 1]),
        ("mid_block_type", None),
        ("num_control_type", 6),  # of ControlNetUnionModel
    ],
)
def test_unsupported_value_is_named(key, value):
    with pytest.raises(UserError) as error:
        ControlNetModel.from_config({**XL, key: value})
    assert key in str(error.value) and "ControlNetModel" in str(error.value)


def test_the_start_of_a_training_is_diffusers(tmp_path):
    """Every weight of ``ControlNetModel.from_unet``, but for the new layers that see the image: they are random."""
    config = {k: v for k, v in XL.items() if not k.startswith("conditioning")}
    unet = randomise(diffusers.UNet2DConditionModel(**config, up_block_types=UP_BLOCKS["sdxl"], sample_size=8))
    widths = XL["conditioning_embedding_out_channels"]
    theirs = through_files(
        diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths), tmp_path / "theirs"
    )
    own = through_files(unet, tmp_path / "unet").params
    new = jax.tree.map(lambda a: np.ones(a.shape, np.float32), theirs.params)
    ours = copied_from_unet(new, own)
    kept = ours.pop("controlnet_cond_embedding")
    assert not kept["conv_out"]["kernel"].any() and kept["conv_in"]["kernel"].all()
    theirs.params.pop("controlnet_cond_embedding")
    jax.tree.map(np.testing.assert_array_equal, ours, theirs.params)
    given, image = inputs(XL)
    residuals = theirs.module.apply({"params": ours | {"controlnet_cond_embedding": kept}}, *given, image)
    assert all(not leaf.any() for leaf in jax.tree.leaves(residuals))


def test_a_shallower_one_starts_from_the_first_blocks():
    block = {"attn": np.arange(6, dtype=np.float32).reshape(2, 3)}
    own = {"mid_block": {"attentions_0": {"transformer_blocks": block}}}
    shallow = copied_from_unet(jax.tree.map(lambda a: 0 * a[:1], own), own)
    assert shallow["mid_block"]["attentions_0"]["transformer_blocks"]["attn"].tolist() == [[0, 1, 2]]
