"""A student that is told its guidance scale (``time_cond_proj_dim``, as latent consistency models have it)."""

import dataclasses

import jax
import numpy as np
import pytest
from diffusers import StableDiffusionXLPipeline
from small_runs import settings
from tiny_models import ONE_LEVEL_XL, save_sdxl
from torch_weights import assert_close, channels_first, channels_last

from mlcm_jax.conditioning import encode_prompts, unconditional
from mlcm_jax.errors import UserError
from mlcm_jax.generate import default_guidance_scale, sample_latents
from mlcm_jax.hub.pipeline import load_pipeline, read_architecture
from mlcm_jax.train.program import build_program

PROMPT = "red heart"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_sdxl(tmp_path_factory.mktemp("told"), ONE_LEVEL_XL | {"time_cond_proj_dim": 16})


def test_samples_are_diffusers(folder):
    reference = StableDiffusionXLPipeline.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    pipeline = load_pipeline(folder)
    noise = np.random.default_rng(0).standard_normal((1, 16, 16, 4), np.float32)
    samples = []
    for guidance_scale in (1.0, 8.5):
        theirs = reference(
            PROMPT,
            latents=channels_first(noise),
            guidance_scale=guidance_scale,
            num_inference_steps=2,
            height=32,
            width=32,
            output_type="latent",
        ).images
        ours = sample_latents(
            pipeline.unet,
            pipeline.scheduler_config,
            noise,
            encode_prompts(pipeline, [PROMPT], 32),
            unconditional(pipeline, 1, 32),
            guidance_scale=guidance_scale,
            num_steps=2,
        )
        assert_close(ours, channels_last(theirs))
        samples.append(ours)
    assert np.abs(samples[0] - samples[1]).max() > 1e-3


def test_default_guidance(folder, sdxl_folder):
    told, plain = read_architecture(folder), read_architecture(sdxl_folder)
    student = dataclasses.replace(plain, scheduler_config={"_class_name": "TCDScheduler"})
    assert [default_guidance_scale(p) for p in (told, plain, student)] == [8.5, 5.0, 1.0]


def test_such_a_student_is_no_teacher(folder):
    with pytest.raises(UserError, match=r"time_cond_proj_dim.*name the model that it was made from"):
        build_program(settings(), read_architecture(folder), jax.devices()[:1])
