"""The few-step methods as configurations: each works on both teachers, and says what it is."""

import pytest
from ml_collections import ConfigDict

from configs import methods, sdxl
from mlcm_jax.errors import UserError
from mlcm_jax.training.checks import validate
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
    assert config.trainable == "lora"
    assert bool(config.latents) == any(stage.config.states == "data" for stage in stages)
    of_teacher = method.emoji if file is methods else method.sdxl
    last = {key: v for changes in (method.first, *(late for _, late in method.later)) for key, v in changes.items()}
    for key, expected in {**last, **of_teacher}.items():
        assert value(stages[-1].config, key) == expected, key


def test_methods_have_the_teachers_guidance_in_common():
    scales = {methods.get_config(name).guidance_scale for name in methods.METHODS if name != "pcm_no_cfg"}
    assert scales == {methods.get_config().guidance_scale}


@pytest.mark.parametrize("file", [methods, sdxl], ids=["emoji", "sdxl"])
def test_unknown_names_are_refused(file):
    with pytest.raises(UserError, match=r"'nix'.*mlcm, lcm"):
        file.get_config("nix")
