"""The programs' way of answering mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
def test_a_mistake_is_one_line_and_status_2(launch, args, message):
    result = launch("convert", *args)
    assert result["status"] == 2, result["stderr"]
    assert result["stderr"].startswith("error: ") and result["stderr"].count("\n") == 1, result["stderr"]
    assert message in result["stderr"]
    assert result["stdout"] == ""


def test_a_process_of_its_own_answers_alike(launch):
    command = [sys.executable, "launch/convert.py", "--modle=a"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    forked = launch("convert", "--modle=a")
    assert forked == {"status": result.returncode, "stdout": result.stdout, "stderr": result.stderr}


def test_convert(launch, sd15_folder, tmp_path):
    result = launch("convert", f"--model={sd15_folder}", f"--out={tmp_path / 'out'}")
    assert result["status"] == 0, result["stderr"]
    for part in ("unet", "vae", "text_encoder"):
        assert f"{part}" in result["stdout"]
        assert (tmp_path / "out" / part / "config.json").is_file()
    assert (tmp_path / "out" / "model_index.json").is_file()
