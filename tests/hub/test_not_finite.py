"""Numbers that are not finite: on the command line, in weights, in samples, in JSON. None of them gets into a file."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_sentence import assert_one_sentence
from safetensors.numpy import load_file

from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.report import _cell
from mlcm_jax.evaluation.statistics.bootstrap import Figure
from mlcm_jax.hub.lora import save_lora, with_loras
from mlcm_jax.hub.pipeline import load_pipeline, save_pipeline
from mlcm_jax.hub.save import save_params, to_json, write_json
from mlcm_jax.models import lora
from mlcm_jax.sampling.decode import decode
from mlcm_jax.training.metrics import MetricWriter, read_metrics

NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def pipeline(sd15_folder):
    return load_pipeline(sd15_folder, param_dtype=jnp.float16)


@pytest.fixture(scope="module")
def lora_folder(pipeline, tmp_path_factory):
    tree = lora.init(jax.random.key(0), pipeline.unet.params, 1, ["to_q$"])
    ones = jax.tree.map(jnp.ones_like, tree)
    folder = tmp_path_factory.mktemp("lora")
    save_lora(ones, folder)
    return folder


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf", "1e999", ""])
def test_a_loras_scale(launch, sd15_folder, lora_folder, tmp_path, scale):
    lora_flag = f"--lora={lora_folder}:{scale}"
    for program, *args in (
        ("convert", f"--out={tmp_path / 'out'}"),
        ("sample", "--prompt=x", f"--out={tmp_path / 'x.png'}"),
    ):
        result = launch(program, f"--model={sd15_folder}", lora_flag, *args)
        assert_one_sentence(result, lora_flag, "which is no scale: write FILE or FILE:0.8")
    assert not list(tmp_path.iterdir())


def test_a_sum_that_overflows(pipeline, lora_folder):
    assert with_loras(pipeline, [f"{lora_folder}:-1000"])
    with pytest.raises(UserError, match=r"to_q with values that float16 does not hold: use a smaller scale"):
        with_loras(pipeline, [f"{lora_folder}:1e6"])


FLAGS = {
    "sample": (["--model=x", "--prompt=x"], ["eta", "guidance_scale"]),
    "evaluate": (["--model=x"], ["guidance_scale", "baseline_guidance_scale"]),
    "train": (["--config=configs/emoji.py"], ["config.optim.learning_rate", "config.ema_decay"]),
}


@pytest.mark.parametrize("program", FLAGS)
def test_flags(launch, program):
    args, names = FLAGS[program]
    for name in names:
        for value in ("nan", "inf"):
            assert_one_sentence(launch(program, *args, f"--{name}={value}"), f"--{name}={value} is no finite number")
    stages = "--config.stages=({'start':2,'guidance_scale':(1.0,float('nan'))},)"
    if program == "train":
        result = launch("train", *args, stages.replace("float('nan')", "1e999"))
        assert_one_sentence(result, "inf is no finite number")


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_weights(pipeline, tmp_path, value):
    params = {"conv": {"kernel": jnp.array([[1.0, value]]), "bias": jnp.zeros(2)}}
    with pytest.raises(UserError, match=r"conv\.weight has values that are no finite numbers, so nothing is written"):
        save_params(params, {}, tmp_path, file_name="x.safetensors")
    assert not list(tmp_path.iterdir())


def test_weights_that_the_dtype_does_not_hold(tmp_path):
    params = {"conv": {"kernel": jnp.array([[1.0, 1e5]])}}
    with pytest.raises(UserError, match=r"conv\.weight has values that float16 does not hold: use --dtype=bfloat16"):
        save_params(params, {}, tmp_path, file_name="x.safetensors", dtype=jnp.float16)
    assert not list(tmp_path.iterdir())
    save_params(params, {}, tmp_path, file_name="x.safetensors", dtype=jnp.bfloat16)
    assert load_file(tmp_path / "x.safetensors")["conv.weight"].shape == (2, 1)


def test_samples(pipeline):
    latents = np.zeros((2, 16, 16, 4), np.float32)
    latents[1, 3, 3, 2] = NAN
    with pytest.raises(UserError, match="The samples are no finite numbers"):
        decode(pipeline.vae, latents)


def test_json(tmp_path):
    value = {"a": [1.0, NAN, (INFINITY, 2)], "b": {"c": -INFINITY, "d": "NaN", "e": True}}
    expected = {"a": [1.0, None, [None, 2]], "b": {"c": None, "d": "NaN", "e": True}}
    assert json.loads(to_json(value), parse_constant=pytest.fail) == expected
    write_json(value, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == expected


def test_metrics(tmp_path):
    writer = MetricWriter(tmp_path, start_step=0)
    writer.write(1, {"loss": 0.5, "grad_norm": NAN})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "grad_norm": None}]


def test_an_interval_of_one_distinct_sample_in_the_tables():
    """One distinct image has no covariance, so a figure of it is NaN, and so is the interval of all resamples."""
    assert _cell(Figure(0.5, np.array([0.4, NAN, 0.6])), 2) == "0.50"
    assert _cell(Figure(NAN, np.array([NAN, NAN])), 2) == "-"


def test_a_bound_that_is_none_is_left_out(sd15_folder, tmp_path):
    scheduler = {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -math.inf, "steps_offset": 1}
    save_pipeline(load_pipeline(sd15_folder), tmp_path / "out", scheduler_config=scheduler)
    written = Path(tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text()
    assert json.loads(written, parse_constant=pytest.fail) == {k: v for k, v in scheduler.items() if v != -math.inf}
