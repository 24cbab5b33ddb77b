"""The shipped student: what launch/sample.py draws where no model is named, and what diffusers draws of its files."""

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image, ImageDraw

from mlcm_jax.rng import MAX_SEED, seed_key
from mlcm_jax.sampling.sample import draw_noise
from mlcm_jax.sampling.text_to_image import SAMPLER_STREAM

EMOJI = Path(__file__).resolve().parents[2] / "examples" / "emoji"
CAPTION = "grinning face, twemoji style"


@pytest.fixture(scope="module")
def drawn(launch, tmp_path_factory):
    """Image and noise of a program that is told the caption and the largest seed alone."""
    folder = tmp_path_factory.mktemp("student")
    result = launch(
        "sample",
        f"--prompt={CAPTION}",
        f"--seed={MAX_SEED}",
        f"--out={folder / 'x.png'}",
        f"--save_latents={folder / 'noise.npy'}",
    )
    assert result["status"] == 0, result["stderr"]
    assert "4 steps of LCMScheduler" in result["stdout"]
    return np.asarray(Image.open(folder / "x.png")), np.load(folder / "noise.npy")


@pytest.fixture(scope="module")
def pipe():
    import torch
    from diffusers import LCMScheduler, StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(EMOJI / "teacher", torch_dtype=torch.float32)
    pipe.load_lora_weights(EMOJI / "student")
    pipe.scheduler = LCMScheduler.from_pretrained(EMOJI / "student")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusers_image(pipe, noise, num_steps, seed, **arguments):
    """Of diffusers' pipeline, whose scheduler is given the fresh noise that ours draws with a seed."""
    import torch
    from diffusers.schedulers import scheduling_lcm

    key, steps = jax.random.fold_in(seed_key(seed), SAMPLER_STREAM), itertools.count()

    def fresh(shape, **_):
        n, channels, *size = shape
        drawn = jax.random.normal(jax.random.fold_in(key, next(steps)), (n, *size, channels))
        return torch.from_numpy(np.array(drawn.transpose(0, 3, 1, 2)))

    settings = {"guidance_scale": 1, "latents": torch.from_numpy(noise), "height": 64, "width": 64}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduling_lcm, "randn_tensor", fresh)
        image = pipe(CAPTION, num_inference_steps=num_steps, **settings, **arguments).images[0]
    assert next(steps) == num_steps - 1, "the last step adds no noise"
    return np.asarray(image).astype(int)


def test_diffusers_draws_the_same(drawn, pipe):
    image, noise = drawn
    assert np.abs(diffusers_image(pipe, noise, 4, MAX_SEED) - image).max() <= 2


def test_diffusers_draws_the_same_with_the_shipped_controlnet(drawn, pipe, launch, tmp_path):
    import torch
    from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline

    edges = Image.new("RGB", (64, 64))
    ImageDraw.Draw(edges).ellipse((8, 20, 56, 44), outline="white")
    edges.save(tmp_path / "edges.png")
    np.save(tmp_path / "noise.npy", drawn[1])
    control = (f"--controlnet={EMOJI / 'controlnet'}", f"--control_image={tmp_path / 'edges.png'}")
    args = (f"--prompt={CAPTION}", f"--latents={tmp_path / 'noise.npy'}", "--steps=2", f"--out={tmp_path / 'x.png'}")
    result = launch("sample", *args, *control)
    assert result["status"] == 0, result["stderr"]
    controlnet = ControlNetModel.from_pretrained(EMOJI / "controlnet", torch_dtype=torch.float32)
    controlled = StableDiffusionXLControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
    theirs = diffusers_image(controlled, drawn[1], 2, 0, image=edges)
    assert np.abs(theirs - np.asarray(Image.open(tmp_path / "x.png"))).max() <= 2
    assert np.abs(theirs - drawn[0]).mean() > 10, "the image follows the ellipse"


def test_all_bits_of_the_seed_count(drawn):
    noise = drawn[1].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(noise, draw_noise(MAX_SEED, 1, noise.shape[1:]), rtol=1e-6)
    assert np.abs(noise - draw_noise(MAX_SEED % 2**32, 1, noise.shape[1:])).max() > 1


def test_it_is_of_the_shipped_size():
    files = [f for f in (EMOJI / "student").iterdir() if f.is_file()]
    assert {f.name for f in files} == {"pytorch_lora_weights.safetensors", "scheduler_config.json"}
    assert sum(f.stat().st_size for f in files) < 6e6
