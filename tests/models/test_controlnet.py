"""ControlNets against diffusers' ControlNetModel in float32, alone and beside a UNet."""

import diffusers
import jax
import numpy as np
import pytest
import torch
from control_cases import CONFIGS, UP_BLOCKS, XL, for_torch, inputs
from torch_weights import assert_close, channels_first, channels_last, randomise, through_files

from mlcm_jax.errors import UserError
from mlcm_jax.models.controlnet import Controlled, ControlledUNet, ControlNetModel, copied_from_unet


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
    params = ours | {"controlnet_cond_embedding": kept}
    residuals = jax.jit(theirs.module.apply)({"params": params}, *given, image)
    assert all(not leaf.any() for leaf in jax.tree.leaves(residuals))


def test_a_shallower_one_starts_from_the_first_blocks():
    block = {"attn": np.arange(6, dtype=np.float32).reshape(2, 3)}
    own = {"mid_block": {"attentions_0": {"transformer_blocks": block}}}
    shallow = copied_from_unet(jax.tree.map(lambda a: 0 * a[:1], own), own)
    assert shallow["mid_block"]["attentions_0"]["transformer_blocks"]["attn"].tolist() == [[0, 1, 2]]
