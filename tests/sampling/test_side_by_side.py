"""A student beside its teacher, and the page's function: the images of each alone, programs compiled once, mistakes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mlcm_jax import load_pipeline
from mlcm_jax.errors import UserError
from mlcm_jax.hub.lora import save_lora
from mlcm_jax.hub.pipeline import network_shapes
from mlcm_jax.models import lora
from mlcm_jax.sampling.page import answers, request_of
from mlcm_jax.sampling.sample import sampling_program
from mlcm_jax.sampling.side_by_side import SideBySide, TimedSampler, check_shared_noise

SIZE = (32, 32)
INPUTS = {"prompt": "red heart", "negative_prompt": "", "steps": 2, "seed": 3, "height": 32, "width": 32, "lora": ""}
TCD = '{"_class_name": "TCDScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}'


@pytest.fixture(scope="module")
def teacher(sdxl_folder):
    return load_pipeline(sdxl_folder)


@pytest.fixture(scope="module")
def loras(teacher, tmp_path_factory):
    """A student's folder, with its sampler, and a style."""
    folder, unet = tmp_path_factory.mktemp("loras"), teacher.pipeline.unet
    flat = traverse_util.flatten_dict(lora.init(jax.random.key(0), network_shapes(unet.module, unet.config), 2))
    rng = np.random.default_rng(0)
    for name in ("student", "style"):
        drawn = {k: jnp.asarray(rng.normal(size=v.shape) * 0.1, jnp.float32) for k, v in flat.items()}
        save_lora(traverse_util.unflatten_dict(drawn), folder / name / "pytorch_lora_weights.safetensors")
    (folder / "student" / "scheduler_config.json").write_text(TCD)
    return folder


@pytest.fixture(scope="module")
def student(teacher, loras):
    return teacher.with_loras(str(loras / "student"))


@pytest.fixture
def both(student, teacher):
    return SideBySide(TimedSampler(student), TimedSampler(teacher, num_steps=3, guidance_scale=2.0))


def ask(models, **inputs):
    return list(answers(models, RuntimeError)(*(INPUTS | inputs).values()))


def test_each_image_is_that_of_its_model_alone(both, student, teacher):
    first, second = ask(both)
    assert first[2:] == [None, ""], "the student's image is shown before there is one of the teacher"
    image, seconds, other, others = second
    np.testing.assert_array_equal(image, student("red heart", num_steps=2, seed=3)[0])
    np.testing.assert_array_equal(other, teacher("red heart", num_steps=3, seed=3, guidance_scale=2.0)[0])
    np.testing.assert_array_equal(image, first[0])
    assert all(re.fullmatch(r"\d+\.\d\d s", text) for text in (seconds, others))
    ((alone, _),) = ask(SideBySide(both.student))
    np.testing.assert_array_equal(alone, image)


def test_inputs_change_the_image(both, loras):
    image, _, other, _ = ask(both)[-1]
    for changed in ({"prompt": "a blue cat"}, {"steps": 1}, {"seed": 4}, {"lora": f" {loras / 'style'}:2.0 "}):
        new, _, others, _ = ask(both, **changed)[-1]
        assert (new != image).any(), changed
        assert (others != other).any() == ("prompt" in changed or "seed" in changed), changed


def test_programs_are_compiled_once_for_a_size(both, loras):
    """Also for other numbers of steps, and for weights with a LoRA; what has to be compiled is run once untimed."""
    calls, call = [], type(both.student.model).__call__

    def counted(self, *args, **settings):
        calls.append(settings["num_steps"])
        return call(self, *args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(both.student.model), "__call__", counted)
        ask(both)
        assert calls == [2, 2, 3, 3]
        compiled = sampling_program._cache_size()
        ask(both, steps=5)
        ask(both, seed=5, lora=str(loras / "style"))
        assert calls == [2, 2, 3, 3, 5, 3, 2, 3] and sampling_program._cache_size() == compiled
        ((image, _),) = ask(SideBySide(both.student), height=24, width=40)
        assert calls[8:] == [2, 2] and image.shape == (24, 40, 3)


def test_the_negative_prompt_reaches_a_student_that_takes_guidance(student, teacher):
    guided = SideBySide(TimedSampler(student, guidance_scale=2.0))
    assert guided.student.takes_negative_prompt and not TimedSampler(student).takes_negative_prompt
    assert TimedSampler(teacher).takes_negative_prompt, "its usual guidance scale is above 1"
    ((without, _),), ((image, _),) = ask(guided), ask(guided, negative_prompt="a blue cat")
    settings = {"num_steps": 2, "seed": 3, "guidance_scale": 2.0, "negative_prompt": "a blue cat"}
    np.testing.assert_array_equal(image, student("red heart", **settings)[0])
    assert (image != without).any()


MISTAKES = {
    "no prompt": ({"prompt": " "}, "There is no prompt"),
    "a negative prompt without guidance": ({"negative_prompt": "blue"}, "takes no guidance"),
    "no seed": ({"seed": None}, "The seed is missing"),
    "a seed below 0": ({"seed": -1}, "The seed -1 cannot work"),
    "half a step": ({"steps": 1.5}, "The number of steps is 1.5"),
    "no steps": ({"steps": 0}, "num_steps=0"),
    "a size": ({"width": 30}, "height=32, width=30 does not fit this model: use a multiple of 4"),
    "no size": ({"height": 0}, "height=0"),
    "no LoRA": ({"lora": "nowhere.safetensors"}, "nowhere.safetensors does not exist"),
    "a scale that is none": ({"lora": "x:strong"}, "'strong', which is no scale"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_sentence_before_anything_is_compiled(both, mistake):
    inputs, words = MISTAKES[mistake]
    compiled = sampling_program._cache_size()
    with pytest.raises(RuntimeError, match=re.escape(words)) as error:
        ask(both, **inputs)
    assert len(str(error.value)) < 300 and error.value.__suppress_context__
    assert sampling_program._cache_size() == compiled and both.student._compiled == set()


def test_models_that_share_no_noise(teacher, sd15_folder):
    pipelines = {"model": teacher.pipeline, "teacher": load_pipeline(sd15_folder).pipeline}
    check_shared_noise(pipelines, SIZE)
    with pytest.raises(UserError, match="does not fit this model"):
        check_shared_noise(pipelines, (30, 32))


def test_the_page_passes_the_image_to_follow():
    request = request_of(*INPUTS.values(), "image", 0.5)
    assert (request.control_image, request.control_scale, request.image_size) == ("image", 0.5, SIZE)
