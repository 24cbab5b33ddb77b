"""The benchmark as a program: a student that is the teacher itself scores as the teacher does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import TEXT, randomise, tiny_tokenizer
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from mlcm_jax.export import ddim_scheduler_config

ROOT = Path(__file__).parents[2]
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
FIGURES = ("latent_mse", "latent_mse_interval", "frechet_distance", "clip_score", "clip_score_interval")


def closeness(**flags):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "benchmarks/closeness.py", *(f"--{name}={value}" for name, value in flags.items())]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def inputs(sdxl_folder, tmp_path_factory):
    """Flags: a student that is the teacher with DDIM as its own scheduler, a scorer and 9 prompts."""
    folder = tmp_path_factory.mktemp("closeness")
    student, scorer, prompts = folder / "student", folder / "scorer", folder / "prompts.txt"
    shutil.copytree(sdxl_folder, student)
    scheduler = student / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(ddim_scheduler_config(json.loads(scheduler.read_text()))))
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=6))
    randomise(model, 5).save_pretrained(scorer)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16).save_pretrained(scorer)
    tiny_tokenizer(folder / "vocabulary").save_pretrained(scorer)
    prompts.write_text("".join(f"{color} {thing}\n" for color in ("red", "blue", "green") for thing in "abc"))
    return {"teacher": sdxl_folder, "student": student, "scorer": scorer, "prompts": prompts}


def test_a_student_that_is_the_teacher(inputs, tmp_path):
    """Two full batches and a part of a third; without guidance the two are the same function."""
    sizes = {"num_images": 8, "batch_size": 3, "guidance_scale": 1, "steps": "1,2,5", "reference_steps": 5}
    result = closeness(**inputs, **sizes, out=tmp_path / "out")
    assert result.returncode == 0, result.stderr

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "benchmarks/closeness.py" in results["command"] and results["hardware"]["cpu"] and results["versions"]["jax"]
    rows = {(row["sampler"], row["steps"]): row for row in results["rows"]}
    assert list(rows) == [*(("teacher", n) for n in (5, 1, 2)), *(("student", n) for n in (1, 2, 5))]
    for n in (1, 2, 5):
        for figure in FIGURES:
            student, teacher = (np.array(rows[who, n][figure]) for who in ("student", "teacher"))
            np.testing.assert_allclose(student, teacher, rtol=1e-5, atol=1e-9)

    reference = rows["teacher", 5]
    assert reference["latent_mse"] == 0 and reference["frechet_distance"] < 1e-9
    assert rows["teacher", 1]["latent_mse"] > rows["teacher", 2]["latent_mse"] > 0
    assert rows["teacher", 1]["frechet_distance"] > 0
    low, high = rows["teacher", 1]["latent_mse_interval"]
    assert low < rows["teacher", 1]["latent_mse"] < high
    assert all(-1 <= row["clip_score"] <= 1 for row in rows.values())

    table = (tmp_path / "out" / "results.md").read_text()
    assert result.stdout == table and len(table.splitlines()) == 2 + len(rows)
    for picture in ("grid.png", "closeness.png"):
        assert np.asarray(Image.open(tmp_path / "out" / picture).convert("L")).std() > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_images": 10}, "--num_images=10 is more than the 9 prompts of"),
        ({"num_images": 8, "steps": "1,x"}, "--steps=1,x is no list of whole numbers"),
        ({"num_images": 8, "steps": "0"}, "num_steps=0 is not possible"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message, inputs, tmp_path):
    result = closeness(**inputs, **flags, out=tmp_path / "out")
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
