"""The autoencoder against diffusers' AutoencoderKL in float32, with weights that go through diffusers' own files."""

import diffusers
import jax
import numpy as np
import pytest
import torch
from torch_weights import assert_close, channels_first, channels_last, randomise, through_files

from mlcm_jax.errors import UserError
from mlcm_jax.models.vae import AutoencoderKL

CONFIG = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
VARIANTS = {
    "plain": {},
    "without quant convolutions": {"use_quant_conv": False, "use_post_quant_conv": False},
    "without attention": {"mid_block_add_attention": False},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_encode_and_decode_are_diffusers(variant, tmp_path):
    model = randomise(diffusers.AutoencoderKL(**CONFIG, **variant))
    network = through_files(model, tmp_path)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
    latents = rng.standard_normal((2, 4, 6, 4), np.float32)

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


def test_a_rematerialised_decoder_has_the_same_gradient_and_keeps_less(tmp_path):
    network = through_files(randomise(diffusers.AutoencoderKL(**CONFIG)), tmp_path)
    latents = np.random.default_rng(0).standard_normal((2, 4, 6, 4), np.float32)
    gradients, kept = [], []
    for policy in (None, "nothing_saveable"):
        module = network.module.clone(remat=policy)

        def loss(latents, module=module):
            return (module.apply({"params": network.params}, latents, method="decode") ** 2).mean()

        gradients.append(jax.jit(jax.grad(loss))(latents))
        backward = jax.eval_shape(lambda z, loss=loss: jax.vjp(loss, z)[1], latents)
        kept.append(sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(backward)))
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [("latents_mean", [0.0] * 4), ("act_fn", "relu"), ("down_block_types", ["AttnDownEncoderBlock2D"] * 2)],
)
def test_unsupported_value_is_named(key, value):
    with pytest.raises(UserError) as error:
        AutoencoderKL.from_config({**CONFIG, key: value})
    assert key in str(error.value)
    assert str(value) in str(error.value).replace("(", "[").replace(")", "]")
