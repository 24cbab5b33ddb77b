"""A student that is conditioning its guidance scale (``time_cond_proj_dim``, as latent consistency models have it)."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from diffusers import StableDiffusionXLPipeline, TCDScheduler
from small_runs import SCHEDULE, random_like, settings
from tiny_models import ONE_LEVEL_XL, save_sdxl
from torch_weights import assert_close, channels_first, channels_last
from toy_denoiser import LATENT_SHAPE, toy_apply, toy_batch, toy_conditioning, toy_params, toy_state

from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.state import Frozen, with_guidance_embedding
from mlcm_jax.distillation.step import make_train_step
from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import load_pipeline, read_architecture
from mlcm_jax.models.unet import guidance_embedding
from mlcm_jax.sampling.conditioning import encode_prompts, unconditional
from mlcm_jax.sampling.sample import default_guidance_scale, sample_latents
from mlcm_jax.sampling.text_to_image import TextToImage
from mlcm_jax.training.export import student_scheduler_config, student_unet
from mlcm_jax.training.program import build_program

PROMPT = "red heart"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_sdxl(tmp_path_factory.mktemp("conditioning"), ONE_LEVEL_XL | {"time_cond_proj_dim": 16})


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return save_sdxl(tmp_path_factory.mktemp("teacher"), ONE_LEVEL_XL)


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


def test_a_student_without_guidance_within_is_guided_as_in_diffusers(teacher_folder):
    """As configs/methods.py:pcm_no_cfg leaves one: TCDScheduler, guidance and a negative prompt."""
    reference = StableDiffusionXLPipeline.from_pretrained(teacher_folder)
    scheduler = student_scheduler_config(dict(reference.scheduler.config) | {"_class_name": "DDIMScheduler"})
    reference.scheduler = TCDScheduler.from_config(scheduler)
    reference.set_progress_bar_config(disable=True)
    sampler = TextToImage(load_pipeline(teacher_folder).with_scheduler(scheduler))
    noise = np.random.default_rng(0).standard_normal((1, 16, 16, 4), np.float32)
    samples = []
    for negative_prompt in ("", "grey"):
        theirs = reference(
            PROMPT,
            guidance_scale=4.0,
            negative_prompt=negative_prompt or None,  # "" would be encoded
            latents=channels_first(noise),
            num_inference_steps=2,
            height=32,
            width=32,
            output_type="latent",
        ).images
        asked = {"guidance_scale": 4.0, "negative_prompt": negative_prompt}
        samples.append(sampler.sample(PROMPT, num_steps=2, latents=noise, **asked))
        assert_close(samples[-1], channels_last(theirs))
    assert np.abs(samples[0] - samples[1]).max() > 1e-3


def test_default_guidance(folder, sdxl_folder):
    conditioning, plain = read_architecture(folder), read_architecture(sdxl_folder)
    student = dataclasses.replace(plain, scheduler_config={"_class_name": "TCDScheduler"})
    assert [default_guidance_scale(p) for p in (conditioning, plain, student)] == [8.5, 5.0, 1.0]


def test_such_a_student_is_no_teacher(folder):
    with pytest.raises(UserError, match=r"time_cond_proj_dim.*name the model that it was made from"):
        build_program(settings(), read_architecture(folder), jax.devices()[:1])


def test_it_starts_as_the_teacher_and_learns_what_it_is_conditioning(teacher_folder):
    """Its state has the embedding's projection, at 0; the gradient of the first step reaches it."""
    config = settings(guidance_embedding_dim=16)
    architecture = read_architecture(teacher_folder)
    program = build_program(config, architecture, jax.devices()[:1])
    projection = program.state.params["time_embedding"]["cond_proj"]["kernel"]
    assert projection.shape == (16, 64) and "cond_proj" not in program.frozen.teacher["time_embedding"]
    teacher = load_pipeline(teacher_folder).unet
    params = with_guidance_embedding(teacher.params, 16)
    assert float(np.abs(params["time_embedding"]["cond_proj"]["kernel"]).max()) == 0
    student = student_unet(teacher, params, config)
    assert student.config["time_cond_proj_dim"] == 16
    z, t = jax.random.normal(jax.random.key(0), (2, 16, 16, 4)), np.full(2, 500)
    conditioning = random_like(program.stages[0].batch.conditioning, 0, 1.0)
    conditioning = jax.tree.map(lambda a: a[:2], conditioning)
    embedding = guidance_embedding(np.array([3.0, 9.0]), 16)
    expected = jax.jit(teacher.module.apply)({"params": teacher.params}, z, t, conditioning)

    def output(params):
        return student.module.apply({"params": params}, z, t, conditioning, embedding)

    same, gradient = jax.jit(lambda p: (output(p), jax.grad(lambda p: (output(p) ** 2).mean())(p)))(params)
    assert_close(same, np.asarray(expected))
    assert float(np.abs(gradient["time_embedding"]["cond_proj"]["kernel"]).max()) > 0


def test_a_step_gives_the_student_its_own_scale():
    """Rows with different scales get different embeddings; the teacher gets none."""
    seen = []

    def conditioned_apply(variables, z, t, conditioning, embedding):
        seen.append(embedding.shape)
        p = variables["params"]
        return toy_apply({"params": p}, z, t, conditioning) + (embedding @ p["w"])[:, None, None, None]

    config, optimizer = settings(guidance_embedding_dim=16), optax.sgd(1.0)
    context = DistillationContext(toy_apply, SCHEDULE, config, student_apply=conditioned_apply)
    step = make_train_step(context, optimizer, LATENT_SHAPE)
    state = toy_state(toy_params(1) | {"w": np.zeros(16, np.float32)}, optimizer, 4)
    frozen = Frozen(toy_params(2), toy_conditioning(1, 4))
    batch = toy_batch(4, 3, [0] * 4, 4).replace(guidance_scale=np.linspace(2, 8, 4, dtype=np.float32))
    after, _ = jax.jit(step)(state, frozen, batch)
    assert set(seen) == {(4, 16)}
    assert float(np.abs(after.params["w"]).max()) > 0
