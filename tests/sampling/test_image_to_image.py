"""Sampling from an image and by a mask: the same as diffusers' pipelines, and mistakes in one sentence."""

import sys
from functools import cache
from types import SimpleNamespace

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from one_sentence import assert_one_sentence
from PIL import Image
from scheduler_configs import SD15, SD21, SDXL, with_class
from torch_weights import assert_close, channels_first, channels_last

from mlcm_jax import load_pipeline
from mlcm_jax.diffusion.denoise import denoise
from mlcm_jax.diffusion.samplers import step_table
from mlcm_jax.diffusion.scheduler_config import of_class
from mlcm_jax.errors import UserError
from mlcm_jax.images import image_grid
from mlcm_jax.rng import seed_key
from mlcm_jax.sampling.text_to_image import SAMPLER_STREAM, TextToImage

PROMPTS = ["red heart", "a cat"]
NOISE = np.random.default_rng(0).standard_normal((2, 16, 16, 4), np.float32)
CLASSES = {
    "sdxl": (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline),
    "sd15": (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline),
}
SIZE = (48, 40)  # of the images given, which is not that of the samples


def picture(seed, size=SIZE):
    """Colours that change slowly, so that resizing and the autoencoder matter."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


IMAGE, MASK = picture(0), picture(1).convert("L")


@pytest.fixture(scope="module")
def loaded(sdxl_folder, sd15_folder):
    """(diffusers' pipeline, ours) by the name of the family, each read once."""
    folders = {"sdxl": sdxl_folder, "sd15": sd15_folder}

    @cache
    def load(family):
        return CLASSES[family][0].from_pretrained(folders[family], local_files_only=True), load_pipeline(
            folders[family]
        )

    return load


@pytest.fixture
def same_noise(monkeypatch):
    """diffusers takes the encoder's mean, starts from NOISE, and adds the noise that our sampler draws."""
    draws, key = iter(range(100)), jax.random.fold_in(seed_key(0), SAMPLER_STREAM)

    def drawn(shape, **_):
        n, channels, height, width = shape
        return channels_first(jax.random.normal(jax.random.fold_in(key, next(draws)), (n, height, width, channels)))

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    monkeypatch.setattr(diffusers.schedulers.scheduling_lcm, "randn_tensor", drawn)
    for _, *edited in CLASSES.values():
        for pipeline in edited:
            monkeypatch.setattr(
                sys.modules[pipeline.__module__], "randn_tensor", lambda *_, **__: channels_first(NOISE)
            )


def pair(loaded, family, which, scheduler):
    """diffusers' pipeline number ``which`` and ours with a scheduler made of the folder's settings."""
    plain, ours = loaded(family)
    reference = CLASSES[family][which].from_pipe(plain)
    reference.scheduler = getattr(diffusers, scheduler).from_config(plain.scheduler.config)
    reference.set_progress_bar_config(disable=True)
    pipeline = ours.pipeline.with_scheduler(of_class(ours.pipeline.scheduler_config, scheduler))
    return reference, TextToImage(pipeline)


def assert_latents_are_diffusers(reference, ours, num_steps, strength, guidance_scale, mask=None, **given):
    """given: the image, and what else diffusers' pipeline takes."""
    theirs = reference(
        PROMPTS,
        strength=strength,
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        output_type="latent",
        **given,
    ).images
    settings = {"latents": NOISE, "num_steps": num_steps, "guidance_scale": guidance_scale}
    assert_close(ours.sample(PROMPTS, **settings, image=IMAGE, mask=mask, strength=strength), channels_last(theirs))


IMAGE_CASES = [
    ("sdxl", "TCDScheduler", 4, 0.5, 1.0),
    ("sdxl", "TCDScheduler", 8, 0.3, 1.0),
    ("sdxl", "TCDScheduler", 2, 1.0, 1.0),
    ("sdxl", "LCMScheduler", 4, 0.75, 5.0),
    ("sd15", "DDIMScheduler", 6, 0.6, 5.0),
    ("sd15", "EulerDiscreteScheduler", 5, 0.5, 5.0),
    ("sd15", "TCDScheduler", 3, 0.7, 5.0),
]


@pytest.mark.parametrize(("family", "scheduler", "num_steps", "strength", "guidance_scale"), IMAGE_CASES)
def test_latents_from_an_image_are_diffusers(
    loaded, same_noise, family, scheduler, num_steps, strength, guidance_scale
):
    both = pair(loaded, family, 1, scheduler)
    small = IMAGE.resize((32, 32), Image.Resampling.LANCZOS)  # it takes no size
    assert_latents_are_diffusers(*both, num_steps, strength, guidance_scale, image=small)


MASK_CASES = [
    ("sdxl", "TCDScheduler", 4, 0.5, 1.0),
    ("sdxl", "TCDScheduler", 3, 1.0, 1.0),
    ("sd15", "DDIMScheduler", 6, 0.6, 5.0),
    ("sd15", "EulerDiscreteScheduler", 5, 0.5, 5.0),
    ("sd15", "EulerDiscreteScheduler", 3, 1.0, 5.0),
]


@pytest.mark.parametrize(("family", "scheduler", "num_steps", "strength", "guidance_scale"), MASK_CASES)
def test_latents_by_a_mask_are_diffusers(loaded, same_noise, family, scheduler, num_steps, strength, guidance_scale):
    both, masked = pair(loaded, family, 2, scheduler), {"mask_image": MASK, "height": 32, "width": 32}
    assert_latents_are_diffusers(*both, num_steps, strength, guidance_scale, MASK, image=IMAGE, **masked)


@pytest.mark.parametrize("which", [1, 2])
def test_images_are_diffusers(loaded, same_noise, which):
    reference, ours = pair(loaded, "sdxl", which, "TCDScheduler")
    small = IMAGE.resize((32, 32), Image.Resampling.LANCZOS)
    masked = {"mask_image": MASK.resize((32, 32), Image.Resampling.LANCZOS)} if which == 2 else {}
    settings = {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 1.0}
    theirs = reference(PROMPTS, image=small, **masked, **settings).images
    mask = MASK if masked else None
    found = ours(PROMPTS, latents=NOISE, num_steps=4, guidance_scale=1.0, image=IMAGE, mask=mask)  # strength: 0.5
    assert np.abs(found.astype(int) - np.stack(theirs)).max() <= 1


SCHEDULERS = {
    "euler": SDXL,
    "euler, linspace, v": with_class(SD21, "EulerDiscreteScheduler", timestep_spacing="linspace"),
    "ddim, v": SD21,
    "pndm": SD15,
    "tcd": with_class(SDXL, "TCDScheduler", original_inference_steps=1000),
    "dpm": with_class(SDXL, "DPMSolverMultistepScheduler"),
}


def torch_network(x, t):
    return torch.sin(x + t.float() / 300) + 0.3 * x


def diffusers_loop(config, num_steps, strength, image, mask):
    """What diffusers' image-to-image and inpainting pipelines do around the network."""
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(num_steps)
    holder = SimpleNamespace(scheduler=scheduler)
    timesteps, _ = StableDiffusionImg2ImgPipeline.get_timesteps(holder, num_steps, strength, "cpu")
    noise, image = torch.from_numpy(NOISE), torch.from_numpy(image)
    options = {"eta": 0.0} if config["_class_name"] == "TCDScheduler" else {}  # diffusers' default is 0.3
    x = scheduler.add_noise(image, noise, timesteps[:1])
    for i, t in enumerate(timesteps):
        x = scheduler.step(torch_network(scheduler.scale_model_input(x, t), t), t, x, **options).prev_sample
        if mask is not None:
            known = scheduler.add_noise(image, noise, timesteps[i + 1 : i + 2]) if i < len(timesteps) - 1 else image
            x = (1 - torch.from_numpy(mask)) * known + torch.from_numpy(mask) * x
    return timesteps.numpy(), x.numpy()


@cache
def our_loop(prediction_type):
    """The loop as one program, whatever the table's numbers are."""

    def network(x, t):
        return jax.numpy.sin(x + t.astype(np.float32)[:, None, None, None] / 300) + 0.3 * x

    noise = jax.numpy.asarray(NOISE)
    return jax.jit(lambda table, image, mask: denoise(network, prediction_type, table, noise, None, image, mask))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_start_late_as_diffusers_do(name, masked):
    config, rng = SCHEDULERS[name], np.random.default_rng(1)
    image = rng.standard_normal((2, 16, 16, 4), np.float32)
    mask = (rng.random((2, 16, 16, 1)) < 0.5).astype(np.float32) if masked else None
    for num_steps, strength in [(4, 0.25), (4, 0.5), (7, 0.6), (10, 0.7), (20, 0.29), (16, 0.99), (3, 1.0)]:
        table = step_table(config, num_steps, strength=strength)
        timesteps, theirs = diffusers_loop(config, num_steps, strength, image, mask)
        np.testing.assert_allclose(table.timesteps, timesteps, rtol=1e-6)
        found = our_loop(table.prediction_type)(table.from_image().arrays, image, mask)
        assert_close(found, theirs, 1e-5)


def test_the_program_draws_what_the_function_does(launch, loaded, sdxl_folder, tmp_path):
    files = {name: tmp_path / name for name in ("image.png", "mask.png", "noise.npy", "out.png")}
    IMAGE.save(files["image.png"])
    MASK.save(files["mask.png"])
    np.save(files["noise.npy"], NOISE.transpose(0, 3, 1, 2))
    given = [f"--image={files['image.png']}", f"--mask={files['mask.png']}", "--strength=0.75"]
    given += [f"--latents={files['noise.npy']}", "--scheduler=TCDScheduler", *(f"--prompt={each}" for each in PROMPTS)]
    result = launch("sample", f"--model={sdxl_folder}", *given, f"--out={files['out.png']}")
    assert result["status"] == 0, result["stderr"]
    _, ours = pair(loaded, "sdxl", 1, "TCDScheduler")
    expected = ours(PROMPTS, latents=NOISE, image=IMAGE, mask=MASK, strength=0.75)
    found = np.asarray(Image.open(files["out.png"]), int)
    assert np.abs(found - image_grid(expected, columns=2)).max() <= 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--mask=MASK"], ["There is a mask and no image"]),
        (["--strength=0.5"], ["There is a strength and no image"]),
        (["--image=nowhere.png"], ["nowhere.png cannot be read as an image"]),
        (["--image=IMAGE", "--mask=nowhere.png"], ["nowhere.png cannot be read as an image"]),
        (["--image=IMAGE", "--mask=SMALL"], ["The mask has 20 x 20 px and the image 48 x 40"]),
        (["--image=IMAGE", "--strength=nan"], ["--strength=nan is no finite number"]),
    ],
)
def test_mistakes_of_the_program(launch, sdxl_folder, tmp_path, args, words):
    images = {"IMAGE": IMAGE, "MASK": MASK, "SMALL": picture(1, (20, 20))}
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
    pairs = [arg.partition("=") for arg in args]
    given = [f"{flag}={tmp_path / value}.png" if value in images else f"{flag}={value}" for flag, _, value in pairs]
    result = launch("sample", f"--model={sdxl_folder}", "--prompt=a", *given, f"--out={tmp_path / 'a.png'}")
    assert_one_sentence(result, *words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask": Image.new("L", SIZE)}, "The mask has no white"),
        ({"strength": -0.1}, "strength=-0.1 cannot work"),
        ({"strength": 1.5}, "strength=1.5 cannot work"),
        ({"strength": 0.0}, "strength=0.0 leaves none of 3 steps: use 0.334 or more"),
        ({"strength": 0.3}, "strength=0.3 leaves none of 3 steps"),
        ({"image_size": (33, 33)}, "image_size=33 does not fit this model: use a multiple of 4"),
    ],
)
def test_mistakes(loaded, settings, words):
    _, ours = loaded("sdxl")
    with pytest.raises(UserError, match=words):
        ours("a", num_steps=3, image=IMAGE, **settings)


@pytest.mark.parametrize("num_steps", range(1, 41))
def test_the_strength_that_a_message_names_works(num_steps):
    with pytest.raises(UserError, match="leaves none") as error:
        step_table(SCHEDULERS["tcd"], num_steps, strength=0)
    named = float(str(error.value).split("use ")[1].split()[0])
    assert len(step_table(SCHEDULERS["tcd"], num_steps, strength=named).timesteps) == 1
