"""The programs' way of answering mistakes, in real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def convert(*args):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "launch/convert.py", *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out=/tmp/x"], "--model"),
        (["--modle=a"], "Unknown command line flag 'modle'"),
        (["--model=/no/such/model", "--out=/no/such/out"], "/no/such/model does not exist: name the folder"),
        (["--model=a", "--out=/no/such/out", "extra"], "Unexpected argument 'extra'"),
        (["--model=a", f"--out={ROOT}"], "is not an empty folder: choose another"),
        (["--model=owner/name", "--out=/no/such/out"], "owner/name is no folder here, and it could not be downloaded"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(args, message):
    result = convert(*args)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr
    assert result.stdout == ""


def test_convert(sd15_folder, tmp_path):
    result = convert(f"--model={sd15_folder}", f"--out={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    for part in ("unet", "vae", "text_encoder"):
        assert f"{part}" in result.stdout
        assert (tmp_path / "out" / part / "config.json").is_file()
    assert (tmp_path / "out" / "model_index.json").is_file()
