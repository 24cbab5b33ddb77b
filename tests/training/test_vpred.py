"""A teacher with v-prediction and zero terminal SNR, as fine-tunes of SDXL are: trained, exported, drawn."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from programs import PROMPT, Programs
from small_runs import settings
from tiny_models import SMALLEST_XL, save_sdxl

from configs import sdxl
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import load_pipeline
from mlcm_jax.sampling.text_to_image import TextToImage
from mlcm_jax.training.export import export
from mlcm_jax.training.program import build_program

ARCHITECTURES = Path(__file__).parents[2] / "configs" / "architectures"
SCHEDULER = json.loads((ARCHITECTURES / "sdxl_vpred" / "scheduler" / "scheduler_config.json").read_text())


def test_the_recipe_is_sdxls_but_for_the_schedule():
    files = {file.relative_to(ARCHITECTURES / "sdxl") for file in (ARCHITECTURES / "sdxl").rglob("*.json")}
    differing = {
        str(file)
        for file in files
        if (ARCHITECTURES / "sdxl" / file).read_bytes() != (ARCHITECTURES / "sdxl_vpred" / file).read_bytes()
    }
    assert differing == {"scheduler/scheduler_config.json"}
    config = sdxl.get_config("vpred")
    assert config.architecture == "configs/architectures/sdxl_vpred" and config.trainable == "lora"
    assert Schedule.from_config(SCHEDULER).prediction_type == "v_prediction"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a short run; half of its states are at the first timestep."""
    folder = tmp_path_factory.mktemp("vpred")
    teacher = save_sdxl(folder / "teacher", SMALLEST_XL, gain=10.0)
    (teacher / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    index, scheduler = teacher / "model_index.json", ["diffusers", SCHEDULER["_class_name"]]
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": scheduler}))
    programs, workdir = Programs(folder, teacher), folder / "run"
    settings = {"num_steps": 4, "num_segments": 2, "sample.steps": "1", "sample.teacher_steps": 2}
    programs.run("train", *programs.train_args(workdir, **settings))
    return workdir


def test_a_student_that_predicts_the_noise_is_refused_where_there_is_nothing_else(architecture):
    teacher = dataclasses.replace(architecture, scheduler_config=SCHEDULER)
    config = settings(
        student_prediction_type="v_prediction", stages=({"start": 5, "student_prediction_type": "epsilon"},)
    )
    with pytest.raises(UserError, match="student_prediction_type='epsilon' cannot tell x0 from pure noise"):
        build_program(config, teacher, jax.devices()[:1])


def test_it_trains_and_its_samples_are_finite(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(np.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    (distances,) = json.loads((trained / "results.json").read_text()).values()
    assert all(np.isfinite(v) for of in distances.values() for v in of.values())
    scheduler = json.loads((trained / "export" / "scheduler" / "scheduler_config.json").read_text())
    expected = {"_class_name": "TCDScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert expected.items() <= scheduler.items()


def test_stock_diffusers_draws_the_same_images(trained):
    assert_same_images(trained / "export", 1, 2)


def test_stock_diffusers_draws_the_images_of_a_student_that_predicts_x0(sdxl_folder, tmp_path):
    teacher, config = load_pipeline(sdxl_folder), settings(trainable="full", student_prediction_type="sample")
    export(teacher, teacher.unet.params, config, tmp_path, format="diffusers", dtype=np.float32)
    scheduler = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "sample"
    assert_same_images(tmp_path, 1)


def assert_same_images(folder, *counts):
    """Of a folder's pipeline here and in diffusers, within 2 of 255, by these numbers of steps."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    noise = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    sampler = TextToImage(load_pipeline(folder, param_dtype=np.float32))
    for num_steps in counts:
        asked = {"guidance_scale": 0, "num_inference_steps": num_steps, "output_type": "np"}
        theirs = np.round(pipe(PROMPT, latents=torch.from_numpy(noise), **asked).images[0] * 255).astype(int)
        ours = sampler(PROMPT, num_steps=num_steps, latents=noise.transpose(0, 2, 3, 1))[0].astype(int)
        assert theirs.std() > 5 and np.abs(ours - theirs).max() <= 2
