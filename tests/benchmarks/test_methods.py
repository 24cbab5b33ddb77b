"""benchmarks/methods.py: it goes on where it was stopped, and reports what failed beside what did not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from one_sentence import assert_one_sentence
from tiny_models import save_sdxl

from mlcm_jax.data.latents import save_latents

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
STEPS = (1, 2, 4, 8)
BASELINES = ("teacher", "untrained_tcd", "untrained_lcm")  # one run for all seeds


@pytest.fixture
def methods(launch, tmp_path):
    """methods(**flags) -> the finished process of the stand-in, which writes to methods.out."""
    files = {"data": tmp_path / "real.npy", "latents": tmp_path / "latents.safetensors"}
    for file in files.values():
        file.touch()
    defaults = files | {"out": tmp_path / "out", "features": "clip=examples/emoji/scorer", "methods": "mlcm,lcm"}

    def run(**flags):
        return launch(
            "../tests/benchmarks/methods_stand_in", *(f"--{name}={value}" for name, value in (defaults | flags).items())
        )

    run.out = tmp_path / "out"
    return run


def lines(file):
    return sorted(file.read_text().splitlines())


def test_all_methods_and_seeds_are_measured_once(methods):
    first = methods(seeds="0,1", jobs=2)
    assert first["status"] == 0, first["stderr"]
    trained = [f"{name}_{seed}" for name in ("lcm", "mlcm") for seed in (0, 1)]
    assert lines(methods.out / "trainings.txt") == trained
    results = json.loads((methods.out / "results.json").read_text())
    assert {(row["sampler"], row["steps"]): row["seeds"] for row in results["rows"]} == {
        **{(name, n): ["0", "1"] for name in ("mlcm", "lcm", *BASELINES) for n in STEPS},
        ("teacher", 25): ["0", "1"],
    }
    plans = results["methods"]
    assert plans["lcm"]["num_steps"] == 100 and plans["lcm"]["tflop"] == 100.0
    # its stages take 1 and 2 TFLOP a step, the second from the middle on
    assert plans["mlcm"]["num_steps"] == 67 and abs(plans["mlcm"]["tflop"] - 100) <= 1.5
    row = next(row for row in results["rows"] if row["sampler"] == "lcm" and row["steps"] == 4)
    figure = row["figures"]["latent_mse"]
    assert figure["value"] == pytest.approx(np.mean(list(figure["by_seed"].values())))
    assert figure["interval"][0] < figure["value"] < figure["interval"][1]
    # The stand-in's figure is 1 + the length of the name + 8 / steps, and one draw for all samplers.
    ratio = results["over_mlcm"]["lcm"]["4"]
    assert ratio["value"] == pytest.approx((1 + len("lcm_0 100") + 2) / (1 + len("mlcm_0 67") + 2))
    assert ratio["interval"] == pytest.approx([ratio["value"]] * 2) and "mlcm" not in results["over_mlcm"]
    table = (methods.out / "methods.md").read_text()
    assert table in first["stdout"] and "| lcm | 4 | " in table and "| mlcm | 67, stage from 34" in table
    for name in ("methods.png", "methods_grid_4.png", "methods_grid_1.png"):
        assert (methods.out / name).stat().st_size > 1000

    written = (methods.out / "runs/lcm_0/figures.json").stat().st_mtime_ns
    figures = methods.out / "runs/mlcm_1/figures.json"
    kept = {n: of_n for n, of_n in json.loads(figures.read_text()).items() if n != "8"}
    figures.write_text(json.dumps(kept))
    before = lines(methods.out / "measurements.txt")
    again = methods(seeds="0,1")
    assert again["status"] == 0, again["stderr"]
    assert lines(methods.out / "trainings.txt") == trained, "a finished training is not repeated"
    assert sorted([*before, "mlcm_1 67 8"]) == lines(methods.out / "measurements.txt")
    assert (methods.out / "runs/lcm_0/figures.json").stat().st_mtime_ns == written
    other = methods(tflop=50)
    assert_one_sentence(other, "figures of other settings (tflop)")


def test_a_method_that_fails_is_named_and_the_others_go_on(methods):
    result = methods(seeds="7,8,0", methods="mlcm")
    assert result["status"] == 2 and "Traceback" not in result["stderr"]
    results = json.loads((methods.out / "results.json").read_text())
    assert results["failed"]["training of mlcm, seed 7"] == "The loss is not finite."
    assert "ended by signal 9" in results["failed"]["training of mlcm, seed 8"]
    assert set(results["failed"]) == {f"training of mlcm, seed {seed}" for seed in (7, 8)}
    assert results["unfinished"] == []
    assert [row["seeds"] for row in results["rows"] if row["sampler"] == "mlcm"] == [["0"]] * 4
    assert "Failed: training of mlcm, seed 7: The loss is not finite." in (methods.out / "methods.md").read_text()
    assert "The loss is not finite." in result["stderr"]


def test_after_the_time_limit_nothing_is_started(methods):
    result = methods(seeds="9,0", methods="mlcm", max_minutes=0.05)
    assert result["status"] == 0, result["stderr"]
    assert "Not finished: 4 of the tasks" in result["stdout"]
    assert not (methods.out / "trainings.txt").exists(), "the running training was stopped"
    results = json.loads((methods.out / "results.json").read_text())
    assert results["failed"] == {} and results["unfinished"][0] == "training of mlcm, seed 9"
    assert {row["sampler"] for row in results["rows"]} == set(BASELINES), "what there is was written"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--methods=nix"], ["--methods has 'nix'", "mlcm"]),
        (["--methods=mlcm"], ["--data=None", "real_images.py"]),
        (["--methods=lcm", "--data=DATA"], ["The method lcm trains on latents", "--latents=FILE"]),
        (["--methods=mlcm", "--data=DATA", "--features=efficientnet=nowhere"], ["efficientnet=nowhere is not there"]),
        (["--methods=mlcm", "--data=DATA", "--seeds=a"], ["--seeds=a is no list"]),
        (["--methods=mlcm", "--data=DATA", "--steps=a"], ["--steps=a is no list"]),
    ],
)
def test_mistakes(launch, tmp_path, args, words):
    (tmp_path / "real.npy").touch()
    given = [
        "--features=clip=examples/emoji/scorer",
        *(arg.replace("DATA", str(tmp_path / "real.npy")) for arg in args),
    ]
    assert_one_sentence(launch("../benchmarks/methods", f"--out={tmp_path / 'out'}", *given), *words)


def test_the_page_gets_table_and_images(tmp_path):
    from methods_report import DOCS, MARKER, put_into_docs

    from mlcm_jax.images import write_image

    assert f"<!-- begin: {MARKER} -->" in (ROOT / DOCS).read_text()
    out, page = tmp_path / "out", tmp_path / DOCS
    page.parent.mkdir()
    page.write_text((ROOT / DOCS).read_text())
    out.mkdir()
    (out / "methods.md").write_text("| a table |\n")
    for name in ("methods", "methods_grid_1", "methods_grid_4"):
        write_image(np.zeros((8, 8, 3), np.uint8), out / f"{name}.png")
    put_into_docs(out, tmp_path)
    text = page.read_text()
    assert "| a table |\n\n![methods](methods.png)\n\n![methods grid 4](methods_grid_4.png)" in text
    assert all((page.parent / f"{name}.png").is_file() for name in ("methods", "methods_grid_1", "methods_grid_4"))
    put_into_docs(out, tmp_path)
    assert page.read_text() == text


@pytest.mark.slow  # two trainings and their measurement: three minutes
def test_two_methods_with_networks(tmp_path):
    (tmp_path / "teacher").mkdir()
    teacher, rng = save_sdxl(tmp_path / "teacher", gain=10.0), np.random.default_rng(0)
    np.save(tmp_path / "real.npy", rng.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8))
    prompts = len((ROOT / "examples/emoji/prompts/train.txt").read_text().splitlines())
    save_latents(rng.standard_normal((prompts, 16, 16, 4), np.float32), tmp_path / "latents.safetensors")
    out = tmp_path / "out"
    command = [sys.executable, "benchmarks/methods.py", f"--teacher={teacher}", f"--data={tmp_path / 'real.npy'}"]
    command += [f"--latents={tmp_path / 'latents.safetensors'}", "--features=clip=examples/emoji/scorer"]
    command += [f"--out={out}", "--methods=mlcm,lcm", "--seeds=0", "--steps=1,4", "--num_images=8", "--jobs=2"]
    command += ["--batch_size=2", "--tflop=0.03"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    finished = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr[-3000:]
    results = json.loads((out / "results.json").read_text())
    assert {name: plan["tflop"] for name, plan in results["methods"].items()} == pytest.approx(
        {"mlcm": 0.03, "lcm": 0.03}, rel=0.15
    )
    steps = {row["sampler"]: [] for row in results["rows"]}
    for row in results["rows"]:
        steps[row["sampler"]].append(row["steps"])
        assert row["figures"]["clip-guard_score"]["by_seed"] and "frechet_distance/clip/data" in row["figures"]
        assert (row["figures"]["latent_mse"]["value"] > 0) == (row["steps"] != 25)
    measured = [*BASELINES, "mlcm", "lcm"]
    assert steps == {name: [25, 4, 1] if name == "teacher" else [4, 1] for name in measured}
