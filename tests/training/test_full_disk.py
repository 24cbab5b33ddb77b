"""A run whose disk becomes full: one sentence, the checkpoint before it whole, and it goes on where there is room."""

import os
import re
import subprocess
import sys

import pytest
from programs import ROOT, Programs, losses
from tiny_models import ONE_LEVEL_XL, save_sdxl

from mlcm_jax.training.checkpoint_files import newest_whole

NUM_STEPS = 12
# A disk of its own for one command; what is on it is copied away before it goes.
SCRIPT = 'mount -t tmpfs -o size=$SIZE none "$DISK" && { "$@"; status=$?; cp -r "$DISK" "$KEPT"; exit $status; }'
ALONE = ("unshare", "--map-root-user", "--mount")


def may_mount(folder) -> bool:
    (folder / "try").mkdir()
    command = [*ALONE, "mount", "-t", "tmpfs", "none", str(folder / "try")]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_full_disk_ends_a_run_that_goes_on_elsewhere(tmp_path):
    if not may_mount(tmp_path):
        pytest.skip("this system does not let a user mount a disk of its own")
    (tmp_path / "teacher").mkdir()
    programs = Programs(tmp_path, save_sdxl(tmp_path / "teacher", ONE_LEVEL_XL, gain=10.0))
    settings = {"num_steps": NUM_STEPS, "checkpoint_every": 1, "keep_checkpoints": 2}
    whole = tmp_path / "whole"
    programs.run("train", *programs.train_args(whole, **settings))
    saved = sum(file.stat().st_size for file in (whole / "checkpoints" / str(NUM_STEPS)).rglob("*") if file.is_file())

    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    args = [sys.executable, "launch/train.py", *programs.train_args(disk / "run", **settings)]
    env = programs.env | {"SIZE": str(int(2.6 * saved)), "DISK": str(disk), "KEPT": str(kept)}
    result = subprocess.run(
        [*ALONE, "sh", "-c", SCRIPT, "sh", *args], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr[-3000:]
    (sentence,) = re.findall(r"^error: .*", result.stderr, re.MULTILINE)
    assert re.search(r"cannot be written \(No space left on device\): make room", sentence), sentence
    step, damaged = newest_whole(kept / "run" / "checkpoints")
    assert step is not None and not damaged
    (kept / "run").rename(tmp_path / "moved")
    programs.run("train", *programs.train_args(tmp_path / "moved", **settings))
    assert losses(tmp_path / "moved") == losses(whole)
    assert os.listdir(disk) == []
