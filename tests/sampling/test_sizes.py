"""Images that are no squares: sampling against diffusers, real images, and the step of a training."""

import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from PIL import Image
from small_runs import SCHEDULE, settings
from toy_denoiser import LATENT_SHAPE, toy_apply, toy_batch, toy_conditioning, toy_params, toy_state

from mlcm_jax import load_pipeline
from mlcm_jax.data.real_images import RealImages
from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.state import Frozen
from mlcm_jax.distillation.step import make_train_step
from mlcm_jax.errors import UserError
from mlcm_jax.image_size import asked_size
from mlcm_jax.sampling.conditioning import time_ids
from mlcm_jax.training.program import build_program

HEIGHT, WIDTH = 24, 40
PROMPTS = ["red heart", "a blue star"]


@pytest.fixture(scope="module")
def ddim_folder(sdxl_folder, tmp_path_factory):
    folder = shutil.copytree(sdxl_folder, tmp_path_factory.mktemp("ddim") / "model")
    index, scheduler = folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", "DDIMScheduler"]}))
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"_class_name": "DDIMScheduler"}))
    return folder


def test_an_image_that_is_no_square_is_diffusers(ddim_folder):
    """The time ids hold both sides: those of a square move the image by 10 of 255."""
    sampler = load_pipeline(ddim_folder)
    noise = sampler.noise(2, seed=1, image_size=(HEIGHT, WIDTH))
    ours = sampler(PROMPTS, num_steps=3, guidance_scale=4.0, latents=noise)
    stock = diffusers.StableDiffusionXLPipeline.from_pretrained(ddim_folder)
    stock.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(np.array(noise).transpose(0, 3, 1, 2))
    theirs = stock(
        PROMPTS,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=3,
        guidance_scale=4.0,
        latents=latents,
        output_type="np",
    ).images
    assert ours.shape == (2, HEIGHT, WIDTH, 3)
    assert np.abs(ours / 255 - theirs).max() < 1.5 / 255
    by_size = sampler(PROMPTS, num_steps=3, guidance_scale=4.0, seed=1, image_size=(HEIGHT, WIDTH))
    np.testing.assert_array_equal(by_size, ours)


def test_time_ids_are_height_and_width():
    np.testing.assert_array_equal(time_ids(2, (HEIGHT, WIDTH)), [[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]] * 2)
    np.testing.assert_array_equal(time_ids(1, 32), [[32, 32, 0, 0, 32, 32]])


@pytest.mark.parametrize(
    ("given", "size"), [((0, 0, 0), None), ((32, 0, 0), (32, 32)), ((0, 24, 40), (24, 40)), ((32, 32, 32), (32, 32))]
)
def test_what_is_asked_for(given, size):
    assert asked_size(*given) == size


@pytest.mark.parametrize("given", [(0, 24, 0), (0, 0, 24), (32, 24, 40), (-1, 0, 0), (0, -8, 8)])
def test_what_contradicts_itself_is_refused(given):
    with pytest.raises(UserError):
        asked_size(*given)


def test_real_images_are_cropped_to_the_proportions(tmp_path):
    """A picture twice as wide as it is high, red with green sides: a third of each side of it is out of a square."""
    wide = np.zeros((30, 60, 3), np.uint8)
    wide[:, 15:45, 0] = wide[:, :15, 1] = wide[:, 45:, 1] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (square,), (same,) = (next(RealImages(tmp_path, size).batches(1, 1)) for size in (30, (15, 30)))
    assert square.shape == (30, 30, 3) and (square[..., 0] == 255).all()
    assert same.shape == (15, 30, 3) and (same[:, :7, 1] > 200).all() and (same[:, 9:21, 0] > 200).all()


def test_a_step_takes_latents_that_are_no_squares(architecture):
    config = settings(height=8, width=16, batch_size=8)
    config.mesh.update({"data": 1, "fsdp": 1, "tensor": 1})
    program = build_program(config, architecture, jax.devices()[:1])
    height, width = 8 // architecture.downscale, 16 // architecture.downscale
    assert program.latent_shape == (height, width, 4) and program.image_size == (8, 16)
    assert program.state.trajectory_buffer is not None
    assert program.state.trajectory_buffer.z.shape == (8, height, width, 4)
    assert "8 x 16 px" in str(program.plan)
    assert jnp.shape(program.stages[0].batch.conditioning.time_ids) == (8, 6)


def test_a_run_of_several_sizes_has_a_step_and_trajectories_for_each(architecture):
    sizes = ((8, 16), (16, 8), (8, 8))
    config = settings(buckets=sizes, batch_size=4, stages=({"start": 5, "num_segments": 2},))
    config.mesh.update({"data": 1, "fsdp": 1, "tensor": 1})
    program = build_program(config, architecture, jax.devices()[:1])
    assert program.image_sizes == sizes and len({stage.step for stage in program.stages}) == 3
    assert (
        len(program.stages) == 6 and len(program.plan.stages) == 2 and "8 x 16, 16 x 8, 8 x 8 px" in str(program.plan)
    )
    buffers = program.state.trajectory_buffer
    assert isinstance(buffers, tuple)
    scale = architecture.downscale
    assert [buffer.z.shape for buffer in buffers] == [(4, h // scale, w // scale, 4) for h, w in sizes]


def test_a_step_of_one_size_leaves_the_others_trajectories_alone():
    optimizer, frozen = optax.sgd(0.1), Frozen(toy_params(2), toy_conditioning(1, 4))
    single = toy_state(toy_params(1), optimizer, 4)
    other = jax.tree.map(lambda a: a + 7, single.trajectory_buffer)
    batch = toy_batch(4, 3, [0] * 4, 4)
    context = DistillationContext(toy_apply, SCHEDULE, settings())
    expected, _ = jax.jit(make_train_step(context, optimizer, LATENT_SHAPE))(single, frozen, batch)
    both = single.replace(trajectory_buffer=(other, single.trajectory_buffer))
    after, _ = jax.jit(make_train_step(context, optimizer, LATENT_SHAPE, 1))(both, frozen, batch)
    jax.tree.map(np.testing.assert_array_equal, after.trajectory_buffer, (other, expected.trajectory_buffer))
    jax.tree.map(np.testing.assert_array_equal, after.params, expected.params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buckets": ((8, 7),)}, "height=8, width=7 does not fit"),
        ({"buckets": ((8,),)}, "must be sizes"),
        ({"buckets": ((8, 8),), "image_size": 8}, "in the place of image_size"),
        ({"buckets": ((8, 8),), "states": "data"}, "needs states that are sampled"),
    ],
)
def test_sizes_that_cannot_work_are_refused(architecture, changes, message):
    with pytest.raises(UserError, match=message):
        build_program(settings(**changes), architecture, jax.devices()[:1])
