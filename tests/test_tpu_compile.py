"""launch/compile.py with the real TPU compiler: a whole step for a v5e 2x2 slice, on a host without TPUs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e .[test]"
)
@pytest.mark.parametrize(
    ("trainable", "attention", "ways"),
    [
        ("full", "auto", ["--memory_only"]),
        pytest.param("lora", "flash", ["--memory_only", "--nomemory_only"], marks=pytest.mark.slow),
    ],
)
def test_the_step_compiles_for_a_v5e_slice(smallest_folder, tmp_path, trainable, attention, ways):
    """What is told before code is generated is what the whole compile tells."""
    (tmp_path / "prompts.txt").write_text("red heart\n")
    settings = {
        "teacher": smallest_folder,
        "prompts": tmp_path / "prompts.txt",
        "sample.prompts": tmp_path / "prompts.txt",
        "trainable": trainable,
        "attention": attention,
        "lora.rank": 4,
        "lora.targets": ("/to_(q|k|v|out_0)$", "/conv[12]$"),
        "batch_size": 4,
        "compute_dtype": "bfloat16",
        "frozen_dtype": "bfloat16",
        "mesh.data": 1,
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
    }
    # Several processes may compile at once: nothing is attached that they could quarrel over.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    env["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    command = [sys.executable, "launch/compile.py", "--config=configs/emoji.py", "--topology=v5e:2x2"]
    command += [f"--config.{name}={value}" for name, value in settings.items()] + [f"--out={tmp_path / 'out.json'}"]
    told = []
    for way in ways:
        result = subprocess.run([*command, way], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "4 x TPU v5 lite, mesh data 1 x fsdp 2 x tensor 2" in result.stdout
        figures = json.loads((tmp_path / "out.json").read_text())
        assert figures["topology"] == "v5e:2x2" and figures["trainable"] == trainable and figures["hbm_gb"] == 16
        assert 0 < figures["arguments_gb"] < figures["used_gb"] < 1
        assert figures["temporaries_gb"] > 0 and figures["tflop_per_step"] > 0
        assert figures["collectives_gb"]["all-gather"] > 0 and figures["collectives_gb"]["all-reduce"] > 0
        told.append(figures)
    before, after = told[0], told[-1]
    assert before["collectives_gb"] == after["collectives_gb"]
    assert before["arguments_gb"] == after["arguments_gb"]
    assert abs(before["used_gb"] - after["used_gb"]) < 0.002 * after["used_gb"]
