"""The small autoencoder against diffusers' AutoencoderTiny, with weights that go through diffusers' own files."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_weights import assert_close, channels_first, channels_last, randomise, through_files

from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import Network, network_shapes
from mlcm_jax.models.tiny_vae import AutoencoderTiny
from mlcm_jax.models.vae import AutoencoderKL
from mlcm_jax.sampling.decode import in_tiles

SMALL = {
    "encoder_block_out_channels": (8,) * 3,
    "decoder_block_out_channels": (6,) * 3,
    "num_encoder_blocks": (1, 2, 1),
    "num_decoder_blocks": (2, 1, 1),
}
VARIANTS = {"relu": {}, "silu, 8 channels": {"act_fn": "silu", "latent_channels": 8, "scaling_factor": 0.5}}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_encode_and_decode_are_diffusers(variant, tmp_path):
    model = randomise(diffusers.AutoencoderTiny(**SMALL, **variant))
    network = through_files(model, tmp_path)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 8, 16, 3)).astype(np.float32)
    latents = 3 * rng.standard_normal((2, 3, 2, variant.get("latent_channels", 4)), np.float32)

    @jax.jit
    def both(variables):
        encoded, variance = network.module.apply(variables, images, method="encode")
        assert variance is None
        return encoded, network.module.apply(variables, latents, method="decode")

    encoded, decoded = both({"params": network.params})
    with torch.no_grad():
        assert_close(encoded, channels_last(model.encode(channels_first(images)).latents))
        assert_close(decoded, channels_last(model.decode(channels_first(latents)).sample))
    assert network.module.downscale == 4


def test_the_published_size_has_the_tensors_of_torch():
    """madebyollin/taesd and taesdxl have diffusers' default settings."""
    from torch_weights import named_shapes

    with torch.device("meta"):
        model = diffusers.AutoencoderTiny()
    config = dict(model.config)
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert named_shapes(network_shapes(AutoencoderTiny.from_config(config), config)) == theirs


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("upsample_fn", "bilinear"),
        ("encoder_block_out_channels", (8, 8, 16)),
        ("decoder_block_out_channels", (6, 6)),
        ("force_upcast", True),
        ("shift_factor", 0.1),
        ("act_fn", "mish"),
    ],
)
def test_unsupported_value_is_named(key, value):
    with pytest.raises(UserError) as error:
        AutoencoderTiny.from_config({**SMALL, key: value})
    shown = list(value) if isinstance(value, tuple) else value
    assert key in str(error.value) and str(shown) in str(error.value)


def test_halves_of_different_depths_are_refused():
    with pytest.raises(UserError, match="different numbers of stages"):
        AutoencoderTiny.from_config(SMALL | {"num_decoder_blocks": (1, 1), "decoder_block_out_channels": (6, 6)})


@pytest.mark.parametrize("size", [1, [1, 32], [], "32"])
def test_a_sample_size_that_is_no_side_is_refused(size):
    with pytest.raises(UserError, match="sample_size="):
        AutoencoderKL.from_config({"sample_size": size})


@pytest.mark.parametrize(("size", "side"), [(None, None), ([32, 16], 32), (64, 64)])
def test_the_side_of_a_tile(size, side):
    """As diffusers' AutoencoderKL reads it; without one there are no tiles."""
    module = AutoencoderKL.from_config({"sample_size": size})
    assert module.config.sample_size == side
    network = Network(module, {}, {})
    latents = jnp.zeros((1, 2048, 2048, 4))
    assert in_tiles(network, latents, "auto") == (side is not None)
    if side is None:
        with pytest.raises(UserError, match=r"no sample_size, .* leave --vae_tiling out"):
            in_tiles(network, latents, "on")
