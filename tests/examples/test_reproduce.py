"""examples/emoji/reproduce.py: parts that go on where they stopped, and tables between their markers."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from one_sentence import assert_one_sentence

from configs.emoji_ablation import row_config
from configs.emoji_full import LCM_STEPS_AT_EQUAL_WORK, get_config
from mlcm_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
EMOJI = ROOT / "examples" / "emoji"


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(EMOJI))
    try:
        return importlib.import_module("results_tables")
    finally:
        sys.path.remove(str(EMOJI))


def figure(value):
    return {"value": value, "interval": [value - 1, value + 1]}


def results(*samplers):
    """A results.json with the figures that tables show; the sampler's number of steps is in each value."""
    keys = ("frechet_distance/efficientnet/data", "clip-guard_score")
    rows = [
        {
            "sampler": sampler,
            "steps": n,
            "figures": {key: figure(10.0 * i + n) for i, key in enumerate(keys, 1)},
            "relative_to_reference": {keys[0]: figure(2.0)},
        }
        for sampler in samplers
        for n in (1, 2, 4, 8, 25)
    ]
    about = {"hardware": {"cores": 2, "jax_devices": ["cpu"]}, "date": "2026-11-26", "versions": {"jax": "0.10.2"}}
    return about | {"rows": rows}


def test_the_short_table_has_teacher_and_student_with_intervals(tables):
    lines = tables.short_table(results("model", "baseline")).splitlines()
    assert lines[0] == "| sampler | steps | Frechet distance | CLIP score |"
    assert lines[2] == "| teacher | 25 | 35.0 (34.0 to 36.0) | 45.000 (44.000 to 46.000) |"
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| teacher", "25"],
        ["| teacher", "4"],
        ["| student", "4"],
        ["| student", "2"],
        ["| student", "1"],
    ]


def test_a_figure_that_was_not_measured_is_a_dash(tables):
    row = results("model")["rows"][0]
    assert tables.cell(row, tables.Column("recall", "recall/efficientnet/data", 2)) == "-"


def test_every_block_finds_its_markers_and_only_the_block_changes(tables, tmp_path):
    for name in ("full", "default", "unguided", "lcm", "lcm_equal_examples"):
        (tmp_path / f"{name}_eval").mkdir()
        (tmp_path / f"{name}_eval" / "results.json").write_text(json.dumps(results("model", "baseline")))
    (tmp_path / "stage_evals" / "1").mkdir(parents=True)
    (tmp_path / "stage_evals" / "1" / "results.json").write_text(json.dumps(results("model")))
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/results.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    before = (tmp_path / "docs/results.md").read_text()
    tables.write_all(tmp_path, tmp_path)
    after = (tmp_path / "docs/results.md").read_text()
    rows = ("student | 8", "LCM, equal work | 1", "teacher without guidance | 25", "stage 1 | 4")
    assert all(f"| {row} |" in after for row in rows)
    outside = [text.split("<!-- end: lcm -->")[1] for text in (before, after)]
    assert outside[0] == outside[1]
    tables.write_all(tmp_path, tmp_path)
    assert (tmp_path / "docs/results.md").read_text() == after, "written twice it stays the same"


def test_a_missing_marker_is_said(tables):
    with pytest.raises(UserError, match=r"README.md needs the markers <!-- begin: short -->"):
        tables.replace_block("no markers", "short", "table", "README.md")


def reproduce(*args):
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(EMOJI / "reproduce.py"), *args]
    finished = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return {"status": finished.returncode, "stdout": finished.stdout, "stderr": finished.stderr}


def test_parts_whose_results_are_there_are_done(tmp_path):
    (tmp_path / "real.npy").touch()
    (tmp_path / "real_train.npy").touch()
    result = reproduce(f"--out={tmp_path}", "--dry_run")
    assert result["status"] == 0, result["stderr"]
    lines = result["stdout"].splitlines()
    assert "images_of_captions: done" in lines and "default_student: to do" in lines and "ablation: to do" in lines
    programs = {line.split()[1] for line in lines if line.startswith("    python")}
    assert len(programs) >= 8 and all((ROOT / program).is_file() for program in programs)


def test_an_unknown_part_is_refused(tmp_path):
    assert_one_sentence(reproduce(f"--out={tmp_path}", "--parts=teacher"), "'teacher'", "--dry_run")


@pytest.mark.parametrize("part", ["shipped", "images"])
def test_a_part_whose_sources_are_missing_is_refused(tmp_path, part):
    assert_one_sentence(reproduce(f"--out={tmp_path}", f"--parts={part}"), str(tmp_path))


@pytest.mark.slow
def test_lcm_gets_as_much_work_as_the_full_recipe():
    from mlcm_jax.training.program import build_program
    from mlcm_jax.training.run import describe_teacher

    lcm = row_config("lcm", LCM_STEPS_AT_EQUAL_WORK)
    lcm.latents = "latents.safetensors"
    works = []
    for config in (get_config(), lcm):
        stages = build_program(config, describe_teacher(config, weights_needed=False)).plan.stages
        works.append(sum((s.end - s.start) * s.flops_per_step for s in stages))
    assert works[1] == pytest.approx(works[0], rel=0.01)
