"""The shipped student: what launch/sample.py draws where no model is named, and what diffusers draws of its files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlcm_jax.rng import MAX_SEED
from mlcm_jax.sampling.sample import draw_noise

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
    assert "4 steps of TCDScheduler" in result["stdout"]
    return np.asarray(Image.open(folder / "x.png")), np.load(folder / "noise.npy")


def test_diffusers_draws_the_same(drawn):
    import torch
    from diffusers import StableDiffusionXLPipeline, TCDScheduler

    image, noise = drawn
    pipe = StableDiffusionXLPipeline.from_pretrained(EMOJI / "teacher", torch_dtype=torch.float32)
    pipe.load_lora_weights(EMOJI / "student")
    pipe.scheduler = TCDScheduler.from_pretrained(EMOJI / "student")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        CAPTION, num_inference_steps=4, guidance_scale=1, latents=torch.from_numpy(noise), height=64, width=64
    )
    assert np.abs(np.asarray(theirs.images[0]).astype(int) - image).max() <= 2


def test_all_bits_of_the_seed_count(drawn):
    noise = drawn[1].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(noise, draw_noise(MAX_SEED, 1, noise.shape[1:]), rtol=1e-6)
    assert np.abs(noise - draw_noise(MAX_SEED % 2**32, 1, noise.shape[1:])).max() > 1


def test_it_is_of_the_shipped_size():
    files = [f for f in (EMOJI / "student").iterdir() if f.is_file()]
    assert {f.name for f in files} == {"pytorch_lora_weights.safetensors", "scheduler_config.json"}
    assert sum(f.stat().st_size for f in files) < 6e6
