"""benchmarks/ablation.py: its rows are configurations that work, and it goes on where it was stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from one_sentence import assert_one_sentence
from tiny_models import save_sdxl

from configs.emoji import get_config as emoji_config
from configs.emoji_ablation import ROWS, get_config, row_config
from mlcm_jax.errors import UserError
from mlcm_jax.training.checks import validate
from mlcm_jax.training.stages import read_stages

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_a_configuration_that_works(name):
    config = row_config(name, 50)
    config.latents = "latents.safetensors"
    stages = read_stages(config)
    for stage in stages:
        validate(stage.config)
    assert [stage.start for stage in stages] == [0, 30][: 1 + bool(ROWS[name].late)]
    for key, value in {**ROWS[name].first, **ROWS[name].late}.items():
        found = stages[-1].config
        for part in key.split("."):
            found = found[part]
        assert found == value, key
    assert config.guidance_scale == emoji_config().guidance_scale, "rows are compared at one guidance"


def test_rows_differ():
    assert len({row_config(name, 50).to_json() for name in ROWS}) == len(ROWS)


def test_an_unknown_row_is_refused():
    with pytest.raises(UserError, match="'stage3' is no row of the ablation: use one of one_step"):
        get_config("stage3")


def test_the_page_has_its_markers():
    page = (ROOT / "docs/ablation.md").read_text()
    assert all(page.count(f"<!-- {end}: ablation -->") == 1 for end in ("begin", "end"))


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    """ablation(**flags) -> the finished process; two steps of two examples, eight images."""
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "teacher").mkdir()
    defaults = {"teacher": save_sdxl(folder / "teacher", gain=10.0), "out": folder / "out"}
    defaults |= {"num_examples": 4, "batch_size": 2, "num_images": 8, "seeds": "0", "data": folder / "real.npy"}
    np.save(folder / "real.npy", np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype(np.uint8))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

    def run(**flags):
        command = [sys.executable, "benchmarks/ablation.py", *(f"--{k}={v}" for k, v in (defaults | flags).items())]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)

    run.out = folder / "out"
    return run


@pytest.mark.slow  # two whole programs with a training each: three minutes
def test_two_rows_one_after_the_other(ablation):
    first = ablation(rows="streaming")
    assert first.returncode == 0, first.stderr[-3000:]
    figures = ablation.out / "runs/streaming_0/figures.json"
    written = figures.stat().st_mtime_ns

    second = ablation(rows="streaming,stage2")
    assert second.returncode == 0, second.stderr[-3000:]
    assert figures.stat().st_mtime_ns == written and "== streaming, seed 0: there already" in second.stdout
    assert "== stage2, seed 0\n" in second.stdout
    rows = json.loads((ablation.out / "ablation.json").read_text())["rows"]
    assert set(rows) == {"teacher", "streaming", "stage2"}
    assert rows["stage2"]["flops_per_example"] > rows["streaming"]["flops_per_example"] > 1e6
    measured = rows["streaming"]["runs"]["0"]["4"]
    assert measured["latent_mse"]["value"] > 0 and measured["frechet_distance/clip/data"]["value"] > 0
    assert len(measured["clip_score"]["replicates"]) == 200
    table = (ablation.out / "ablation.md").read_text()
    assert table in second.stdout and "| streaming, stage 2 improved | 1 |" in table
    assert (ablation.out / "ablation.png").stat().st_size > 10_000

    other = ablation(num_images=6, rows="streaming")
    assert other.returncode == 2 and "holds figures of other settings" in other.stderr, other.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--rows=lcm"], ["The row lcm needs --latents"]),
        (["--rows=stage3"], ["--rows has 'stage3'"]),
        (["--rows=mds", "--seeds=a"], ["--seeds=a is no list"]),
        (["--rows=mds", "--num_examples=30"], ["less than two steps of 16"]),
    ],
)
def test_mistakes(launch, tmp_path, args, words):
    assert_one_sentence(launch("../benchmarks/ablation", f"--out={tmp_path / 'out'}", *args), *words)
