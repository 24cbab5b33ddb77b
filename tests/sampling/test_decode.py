"""Images from latents: in tiles as diffusers' enable_tiling makes them, and with another autoencoder."""

import dataclasses
from functools import partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_models import randomise, tiny_vae
from torch_weights import assert_close, channels_first, channels_last

import mlcm_jax.sampling.decode
from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import load_network, load_pipeline
from mlcm_jax.hub.vae import load_vae
from mlcm_jax.sampling.decode import decode, encode, in_tiles
from mlcm_jax.sampling.tiling import decode_in_tiles


@pytest.fixture(scope="module")
def vae(vae_folder):
    return load_network(vae_folder, "AutoencoderKL")


@pytest.fixture(scope="module")
def sdxl(sdxl_folder):
    return load_pipeline(sdxl_folder)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taesd")
    blocks = {f"num_{half}_blocks": (1, 1) for half in ("encoder", "decoder")}
    widths = {f"{half}_block_out_channels": (8, 8) for half in ("encoder", "decoder")}
    randomise(diffusers.AutoencoderTiny(**blocks, **widths), 5).save_pretrained(folder)
    return folder


def latents_of(height, width):
    return np.random.default_rng(0).standard_normal((1, height, width, 4), np.float32)


# latents of 2 px in tiles of 16 latents, 12 apart: last tiles of 4, 12 and 16
@pytest.mark.parametrize(("height", "width"), [(28, 36), (40, 16)])
def test_tiles_are_put_together_as_in_diffusers(vae, height, width):
    model = randomise(tiny_vae(), 0)
    model.enable_tiling()
    latents = latents_of(height, width)
    with torch.no_grad():
        expected = channels_last(model.decode(channels_first(latents)).sample)
    whole = partial(vae.module.apply, {"params": vae.params}, method="decode")
    assert_close(jax.jit(partial(decode_in_tiles, whole, tile=32, downscale=2))(latents), expected)
    images = decode(vae, latents * vae.config["scaling_factor"], tiling="on")
    assert np.abs(images / 127.5 - 1 - expected.clip(-1, 1)).max() < 0.006


def test_tiles_of_a_decoder_without_context_are_the_whole(vae):
    """Where a pixel depends on one latent only, neither overlap nor seams may show."""
    latents = latents_of(27, 45)
    whole = latents[..., :3].repeat(4, axis=1).repeat(4, axis=2)
    got = decode_in_tiles(lambda z: z[..., :3].repeat(4, axis=1).repeat(4, axis=2), jnp.asarray(latents), 32, 4)
    np.testing.assert_allclose(got, whole, atol=1e-6)


def test_images_of_a_batch_are_one_program_and_uint8_when_they_are_fetched(vae, monkeypatch):
    latents = np.random.default_rng(0).standard_normal((3, 4, 4, 4), np.float32)
    one_by_one = np.concatenate([decode(vae, latents[i : i + 1]) for i in range(3)])
    calls, run = [], mlcm_jax.sampling.decode.decoding_program

    def counted(*args):
        calls.append(run(*args))
        return calls[-1]

    monkeypatch.setattr(mlcm_jax.sampling.decode, "decoding_program", counted)
    images = decode(vae, latents)
    np.testing.assert_array_equal(images, one_by_one)
    (on_device,) = calls
    assert isinstance(on_device, jax.Array) and on_device.dtype == images.dtype == np.uint8


@pytest.mark.parametrize(
    ("side", "tiling", "expected"),
    [(512, "auto", False), (513, "auto", True), (16, "on", False), (17, "on", True), (1000, "off", False)],
)
def test_when_tiles_are_used(vae, side, tiling, expected):
    assert in_tiles(vae, np.zeros((1, 8, side, 4)), tiling) == expected


def test_a_tiny_autoencoder_takes_the_place_of_the_own(sdxl, tiny_folder):
    tiny = load_vae(tiny_folder, sdxl)
    latents = latents_of(6, 4)
    with torch.no_grad():
        model = diffusers.AutoencoderTiny.from_pretrained(tiny_folder)
        expected = channels_last(model.decode(channels_first(latents)).sample)
    assert np.abs(decode(tiny, latents) / 127.5 - 1 - expected.clip(-1, 1)).max() < 0.006
    images = np.random.default_rng(1).integers(0, 256, (2, 4, 8, 3), np.uint8)
    with torch.no_grad():
        expected = channels_last(model.encode(channels_first(images / np.float32(127.5) - 1)).latents)
    assert_close(encode(tiny, images), expected)
    assert not in_tiles(tiny, np.zeros((1, 2000, 8, 4)), "auto")
    with pytest.raises(UserError, match="leave tiling out"):
        decode(tiny, latents, tiling="on")


def test_the_vae_of_a_whole_pipeline(sdxl, sd15_folder):
    assert load_vae(sd15_folder, sdxl).config["_class_name"] == "AutoencoderKL"


def test_an_autoencoder_of_other_latents_is_refused(sdxl, tiny_folder, tmp_path):
    with pytest.raises(UserError, match=r"UNet2DConditionModel, no autoencoder: use AutoencoderKL or AutoencoderTiny"):
        load_vae(sdxl.folder / "unet", sdxl)
    with pytest.raises(UserError, match=r"config.json does not exist"):
        load_vae(tmp_path, sdxl)
    diffusers.AutoencoderTiny(
        **{f"num_{half}_blocks": (1,) for half in ("encoder", "decoder")},
        **{f"{half}_block_out_channels": (8,) for half in ("encoder", "decoder")},
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="4 channels for 1 pixels a side, and one of the model has 4 for 2"):
        load_vae(tmp_path, sdxl)


def test_a_pipeline_with_a_tiny_autoencoder_of_its_own(sdxl, tiny_folder):
    with_tiny = dataclasses.replace(sdxl, vae=load_vae(tiny_folder, sdxl))
    assert with_tiny.downscale == sdxl.downscale == 2
