"""The few-step methods as configurations: each works on both teachers, and says what it is."""

import diffusers
import numpy as np
import pytest
from ml_collections import ConfigDict
from scheduler_configs import SDXL

from configs import methods, sdxl
from mlcm_jax.diffusion.samplers import step_table
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.distillation.segments import boundaries
from mlcm_jax.errors import UserError
from mlcm_jax.training.batch_plan import source_of
from mlcm_jax.training.checks import validate
from mlcm_jax.training.export import student_scheduler_config
from mlcm_jax.training.stages import read_stages


def value(config: ConfigDict, key: str):
    for part in key.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("file", [methods, sdxl], ids=["emoji", "sdxl"])
@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_is_a_configuration_that_works(file, name):
    method, config = methods.METHODS[name], file.get_config(name)
    if name == "tscd_reward" and file is sdxl:
        config.preference.reward_model = "image_reward=FOLDER"  # of the user's
    stages = read_stages(config)
    for stage in stages:
        validate(stage.config)
    assert config.num_steps == (method.emoji_steps if file is methods else method.sdxl_steps)
    assert config.trainable == ("full" if name == "lightning_full" else "lora")
    assert bool(config.latents) == any(source_of(stage).reads_latents for stage in stages)
    of_teacher = method.emoji if file is methods else method.sdxl
    last = {key: v for changes in (method.first, *(late for _, late in method.later)) for key, v in changes.items()}
    if methods.RATE in last:
        last["optim.learning_rate"] = last.pop(methods.RATE) * config.optim.learning_rate
    for key, expected in {**of_teacher, **last}.items():
        assert value(stages[-1].config, key) == expected, key


def test_methods_have_the_teachers_guidance_in_common():
    scales = {methods.get_config(name).guidance_scale for name in methods.METHODS if name != "pcm_no_cfg"}
    assert scales == {methods.get_config().guidance_scale}


@pytest.mark.parametrize("file", [methods, sdxl], ids=["emoji", "sdxl"])
def test_unknown_names_are_refused(file):
    with pytest.raises(UserError, match=r"'nix'.*mlcm, lcm"):
        file.get_config("nix")


@pytest.mark.parametrize("name", methods.METHODS)
def test_the_exported_scheduler_visits_what_was_trained(name):
    """In diffusers itself: as many steps as there are segments begin at their upper boundaries."""
    for stage in read_stages(methods.get_config(name)):
        exported = student_scheduler_config(SDXL, stage.config.sampler, stage.config.student_prediction_type)
        scheduler = getattr(diffusers, exported["_class_name"]).from_config(exported)
        scheduler.set_timesteps(stage.config.num_segments)
        np.testing.assert_array_equal(scheduler.timesteps, boundaries(stage.config.num_segments)[:-1])


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_the_exported_scheduler_is_eulers_trailing_one(num_steps):
    """SDXL-Lightning's sampler: the same timesteps, and the same steps in z / alpha but for the last, which ends at
    sigma = 0 instead of that of timestep 0."""
    euler = step_table({**SDXL, "timestep_spacing": "trailing"}, num_steps)
    tcd = step_table(student_scheduler_config(SDXL), num_steps)
    np.testing.assert_array_equal(euler.timesteps, tcd.timesteps)
    np.testing.assert_allclose(euler.eps[:-1] / euler.x0[:-1], tcd.eps[:-1] / tcd.x0[:-1], rtol=1e-5)
    np.testing.assert_allclose([euler.eps[-1, 0], tcd.eps[-1, 0]], [0.0, np.sqrt(0.00085)], rtol=1e-4)


def test_lcms_scheduler_ends_at_the_predicted_x0():
    """The last of four steps of the exported LCMScheduler, and the noise level that the first one leads to."""
    table = step_table(student_scheduler_config(SDXL, "lcm"), 4)
    np.testing.assert_allclose([table.x0[-1, 0], table.sample[-1, 0], table.noise[-1]], [1.0, 0.0, 0.0], atol=1e-6)
    alpha = np.sqrt(Schedule.from_config(SDXL).alphas_cumprod[749])
    np.testing.assert_allclose([table.x0[0, 0], table.noise[0]], [alpha, np.sqrt(1 - alpha**2)], rtol=1e-5)
