"""The UNet against diffusers' UNet2DConditionModel in float32, with weights that go through diffusers' own files."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_weights import assert_close, assert_trees_close, channels_first, channels_last, randomise, through_files

from mlcm_jax.errors import UserError
from mlcm_jax.models.unet import UNet2DConditionModel
from mlcm_jax.types import TextConditioning

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
COMMON = {"norm_num_groups": 4, "cross_attention_dim": 12, "sample_size": 8}
CONFIGS = {
    "sdxl": {
        **COMMON,
        "block_out_channels": (8, 16, 32),
        "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 10 + 6 * 6,
    },
    "sd15": {
        **COMMON,
        "block_out_channels": (8, 16),
        "down_block_types": (CROSS_DOWN, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", CROSS_UP),
        "layers_per_block": 2,
        "attention_head_dim": 2,
    },
    "sd21": {
        **COMMON,
        "block_out_channels": (8, 16),
        "down_block_types": (CROSS_DOWN, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", CROSS_UP),
        "layers_per_block": 1,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "ssd1b": {  # fewer blocks on the way down than up, and none in the middle
        **COMMON,
        "block_out_channels": (8, 16),
        "down_block_types": (CROSS_DOWN, CROSS_DOWN),
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": (CROSS_UP, CROSS_UP),
        "layers_per_block": (2, 1),
        "transformer_layers_per_block": [[1, 2], 1],
        "reverse_transformer_layers_per_block": [[3, 1], 2],
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
    },
    "guidance": {  # a student that is told the guidance scale
        **COMMON,
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "time_cond_proj_dim": 6,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
}


def inputs(config):
    """(sample, timesteps, conditioning, timestep_cond); the image is wider than high."""
    rng = np.random.default_rng(0)
    side = 2 ** (len(config["block_out_channels"]) - 1)
    conditioning = TextConditioning(
        hidden_states=rng.standard_normal((2, 5, 12), np.float32),
        pooled=rng.standard_normal((2, 10), np.float32),
        time_ids=np.array([[64, 48, 0, 8, 64, 64], [1024, 768, 16, 0, 1024, 1024]], np.float32),
    )
    width = config.get("time_cond_proj_dim")
    return (
        rng.standard_normal((2, 2 * side, 4 * side, 4), np.float32),
        np.array([999, 261]),
        conditioning,
        None if width is None else rng.standard_normal((2, width), np.float32),
    )


def torch_output(model, config):
    """diffusers' output for the same inputs, and the sample that it was computed from."""
    sample, timesteps, conditioning, timestep_cond = inputs(config)
    sample = channels_first(sample).requires_grad_()
    added = {
        "text_embeds": torch.from_numpy(conditioning.pooled),
        "time_ids": torch.from_numpy(conditioning.time_ids),
    }
    output = model(
        sample,
        torch.from_numpy(timesteps),
        torch.from_numpy(conditioning.hidden_states),
        timestep_cond=None if timestep_cond is None else torch.from_numpy(timestep_cond),
        added_cond_kwargs=added,
    ).sample
    return output, sample


def build(name, folder):
    """diffusers' model with random weights, and what the loader makes of its files."""
    model = randomise(diffusers.UNet2DConditionModel(**CONFIGS[name]))
    return model, through_files(model, folder)


def squared_output(module):
    """(params, sample, other inputs) -> (gradients of half the output's square, output)."""

    def half_square(params, sample, rest):
        output = module.apply({"params": params}, sample, *rest)
        return 0.5 * jnp.square(output).sum(), output

    return jax.jit(jax.grad(half_square, argnums=(0, 1), has_aux=True))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """(diffusers' model, Network, ((parameter gradients, sample gradient), output))."""
    model, network = build("sdxl", tmp_path_factory.mktemp("sdxl"))
    sample, *rest = inputs(CONFIGS["sdxl"])
    return model, network, squared_output(network.module)(network.params, sample, rest)


def test_sdxl_output_and_gradients_are_diffusers(sdxl):
    model, _, ((_, ours), output) = sdxl
    theirs, sample = torch_output(model, CONFIGS["sdxl"])
    assert_close(output, channels_last(theirs))
    theirs.square().sum().mul(0.5).backward()
    assert_close(ours, channels_last(sample.grad))


def test_recomputing_activations_changes_no_number(sdxl):
    _, network, (gradients, output) = sdxl
    sample, *rest = inputs(CONFIGS["sdxl"])
    module = UNet2DConditionModel.from_config(network.config, remat=True)
    remat_gradients, remat_output = squared_output(module)(network.params, sample, rest)
    assert_close(remat_output, np.asarray(output), 1e-5)
    assert_trees_close(remat_gradients, gradients)
    assert "remat" in str(jax.make_jaxpr(squared_output(module))(network.params, sample, rest))


@pytest.mark.parametrize("name", ["sd15", "sd21", "ssd1b", "guidance"])
def test_output_is_diffusers(name, tmp_path):
    model, network = build(name, tmp_path)
    ours = jax.jit(network.module.apply)({"params": network.params}, *inputs(CONFIGS[name]))
    with torch.no_grad():
        theirs, _ = torch_output(model, CONFIGS[name])
    assert_close(ours, channels_last(theirs))


def test_guidance_embedding_must_fit_the_config():
    config = CONFIGS["sd15"]
    with pytest.raises(ValueError, match="time_cond_proj_dim"):
        module = UNet2DConditionModel.from_config(config)
        jax.eval_shape(module.init, jax.random.key(0), *inputs(config)[:3], np.zeros((2, 6), np.float32))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_embed_type", "timestep"),
        ("addition_embed_type", "image"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("resnet_time_scale_shift", "scale_shift"),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
        ("up_block_types", ["UpBlock2D"]),
        ("transformer_layers_per_block", [1, 2, 3]),
        ("transformer_layers_per_block", [0, 1]),
        ("reverse_transformer_layers_per_block", [1, [1, 2]]),
        ("layers_per_block", [2]),
        ("attention_head_dim", None),
        ("attention_head_dim", 3),
        ("block_out_channels", [8, 18]),
        ("norm_num_groups", None),
        ("norm_eps", "1e-5"),
        ("cross_attention_dim", [12, 12]),
        ("time_cond_proj_dim", 0),
    ],
)
def test_unsupported_value_is_named(key, value):
    with pytest.raises(UserError) as error:
        UNet2DConditionModel.from_config({**CONFIGS["sd15"], key: value})
    assert key in str(error.value)
    assert str(value) in str(error.value).replace("(", "[").replace(")", "]")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("addition_time_embed_dim", None),
        ("addition_time_embed_dim", 7),
        ("projection_class_embeddings_input_dim", None),
        ("projection_class_embeddings_input_dim", 36),
    ],
)
def test_text_time_needs_its_widths(key, value):
    with pytest.raises(UserError, match=f"{key}={value}"):
        UNet2DConditionModel.from_config({**CONFIGS["sdxl"], key: value})


def test_uneven_stages_need_the_depths_of_the_way_up():
    config = {**CONFIGS["ssd1b"], "reverse_transformer_layers_per_block": None}
    with pytest.raises(UserError, match=r"reverse_transformer_layers_per_block=None.*list of 2"):
        UNet2DConditionModel.from_config(config)


def test_unknown_key_is_named():
    with pytest.raises(UserError, match="controlnet_scale"):
        UNet2DConditionModel.from_config({**CONFIGS["sd15"], "controlnet_scale": 1})
