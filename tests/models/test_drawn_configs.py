"""Networks of drawn sizes against diffusers and transformers in float32: what no one thought of writing down.

Every example writes the weights with torch and reads them with our loader. The draws are the same at each run.
"""

import tempfile

import diffusers
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import torch
import transformers
from torch_weights import assert_close, channels_first, channels_last, randomise, through_files

from mlcm_jax.types import TextConditioning

GROUPS = 4
SETTINGS = {"deadline": None, "derandomize": True, "database": None, "phases": [hypothesis.Phase.generate]}
few = hypothesis.settings(max_examples=2, **SETTINGS)
many = hypothesis.settings(max_examples=12, **SETTINGS)


@st.composite
def unets(draw):
    """Settings of a UNet2DConditionModel with one to three levels."""
    levels = draw(st.integers(1, 3))

    def each(strategy):
        return tuple(draw(st.lists(strategy, min_size=levels, max_size=levels)))

    attends = each(st.booleans())
    depths, layers = each(st.integers(1, 2)), each(st.integers(1, 2))
    config = {
        "sample_size": 8,
        "norm_num_groups": GROUPS,
        "cross_attention_dim": draw(st.sampled_from([4, 12])),
        "in_channels": draw(st.sampled_from([3, 4])),
        "out_channels": draw(st.sampled_from([3, 4])),
        "block_out_channels": each(st.sampled_from([8, 12, 16])),
        "attention_head_dim": each(st.sampled_from([1, 2, 4])),
        "layers_per_block": layers,
        "transformer_layers_per_block": depths,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "mid_block_type": draw(st.sampled_from(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"])),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
        "use_linear_projection": draw(st.booleans()),
        "upcast_attention": draw(st.booleans()),
        "flip_sin_to_cos": draw(st.booleans()),
        "freq_shift": draw(st.sampled_from([0, 1])),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "time_cond_proj_dim": draw(st.sampled_from([None, 6])),
    }
    if draw(st.booleans()):  # other depths on the way up than on the way down, as SSD-1B has them
        config["reverse_transformer_layers_per_block"] = each(st.integers(1, 2))
    if draw(st.booleans()):
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": draw(st.sampled_from([2, 6]))}
        config["projection_class_embeddings_input_dim"] = 10 + 6 * config["addition_time_embed_dim"]
    return config


def check_unet(config):
    model = randomise(diffusers.UNet2DConditionModel(**config))
    with tempfile.TemporaryDirectory() as folder:
        network = through_files(model, folder)
    rng, side = np.random.default_rng(0), 2 ** (len(config["block_out_channels"]) - 1)
    sample = rng.standard_normal((2, side, 2 * side, config["in_channels"]), np.float32)
    t = np.array([999, 17])
    conditioning = TextConditioning(
        hidden_states=rng.standard_normal((2, 3, config["cross_attention_dim"]), np.float32),
        pooled=rng.standard_normal((2, 10), np.float32),
        time_ids=rng.integers(0, 1024, (2, 6)).astype(np.float32),
    )
    width = config["time_cond_proj_dim"]
    guidance = None if width is None else rng.standard_normal((2, width), np.float32)
    ours = jax.jit(network.module.apply)({"params": network.params}, sample, t, conditioning, guidance)
    with torch.no_grad():
        theirs = model(
            channels_first(sample),
            torch.from_numpy(t),
            torch.from_numpy(conditioning.hidden_states),
            timestep_cond=None if guidance is None else torch.from_numpy(guidance),
            added_cond_kwargs={
                "text_embeds": torch.from_numpy(conditioning.pooled),
                "time_ids": torch.from_numpy(conditioning.time_ids),
            },
        ).sample
    assert_close(ours, channels_last(theirs))


@st.composite
def autoencoders(draw):
    """Settings of an AutoencoderKL with one to three levels."""
    levels = draw(st.integers(1, 3))
    channels = st.sampled_from([4, 8, 12])
    return {
        "block_out_channels": tuple(draw(st.lists(channels, min_size=levels, max_size=levels))),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": draw(st.integers(1, 2)),
        "latent_channels": draw(st.sampled_from([4, 8])),
        "norm_num_groups": GROUPS,
        "use_quant_conv": draw(st.booleans()),
        "use_post_quant_conv": draw(st.booleans()),
        "mid_block_add_attention": draw(st.booleans()),
    }


def check_autoencoder(config):
    model = randomise(diffusers.AutoencoderKL(**config))
    with tempfile.TemporaryDirectory() as folder:
        network = through_files(model, folder)
    rng, side = np.random.default_rng(0), 2 ** (len(config["block_out_channels"]) - 1)
    images = rng.uniform(-1, 1, (2, 2 * side, 3 * side, 3)).astype(np.float32)
    latents = rng.standard_normal((2, 3, 2, config["latent_channels"]), np.float32)

    @jax.jit
    def both(variables):
        encoded = network.module.apply(variables, images, method="encode")
        return *encoded, network.module.apply(variables, latents, method="decode")

    mean, logvar, decoded = both({"params": network.params})
    with torch.no_grad():
        posterior = model.encode(channels_first(images)).latent_dist
        assert_close(mean, channels_last(posterior.mean))
        assert_close(logvar, channels_last(posterior.logvar))
        assert_close(decoded, channels_last(model.decode(channels_first(latents)).sample))


@st.composite
def text_towers(draw):
    """(class name, settings) of a CLIP text tower."""
    heads = draw(st.sampled_from([1, 2, 4]))
    return draw(st.sampled_from(["CLIPTextModel", "CLIPTextModelWithProjection"])), {
        "hidden_size": heads * draw(st.sampled_from([4, 6])),
        "intermediate_size": draw(st.sampled_from([8, 20])),
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "hidden_act": draw(st.sampled_from(["quick_gelu", "gelu"])),
        "layer_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "projection_dim": draw(st.sampled_from([6, 10])),
        "vocab_size": 50,
        "max_position_embeddings": 9,
        "eos_token_id": draw(st.sampled_from([2, 7])),
    }


def check_text_tower(drawn):
    class_name, config = drawn
    model = randomise(getattr(transformers, class_name)(transformers.CLIPTextConfig(**config)))
    with tempfile.TemporaryDirectory() as folder:
        network = through_files(model, folder)
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (3, 8))
    ids[:, 5] = 7
    ours = jax.jit(network.module.apply)({"params": network.params}, ids)
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(ids), output_hidden_states=True)
    assert_close(ours.penultimate, theirs.hidden_states[-2])
    assert_close(ours.last_hidden_state, theirs.last_hidden_state)
    assert_close(ours.pooled, theirs.text_embeds if network.module.with_projection else theirs.pooler_output)


@few
@hypothesis.given(unets())
def test_a_drawn_unet_is_diffusers(config):
    check_unet(config)


@few
@hypothesis.given(autoencoders())
def test_a_drawn_autoencoder_is_diffusers(config):
    check_autoencoder(config)


@few
@hypothesis.given(text_towers())
def test_a_drawn_text_tower_is_transformers(drawn):
    check_text_tower(drawn)


@pytest.mark.slow  # compiles a network of up to three levels for each of the draws
@many
@hypothesis.given(unets())
def test_many_drawn_unets_are_diffusers(config):
    check_unet(config)


@pytest.mark.slow  # as above
@many
@hypothesis.given(autoencoders())
def test_many_drawn_autoencoders_are_diffusers(config):
    check_autoencoder(config)


@pytest.mark.slow  # as above
@many
@hypothesis.given(text_towers())
def test_many_drawn_text_towers_are_transformers(drawn):
    check_text_tower(drawn)
