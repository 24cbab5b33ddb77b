"""A run whose disk becomes full: one sentence, the checkpoint before it whole, and it goes on where there is room."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from etils import epath
from forked_programs import ROOT
from multihost_worker import train
from programs import losses

from mlcm_jax.training.checkpoint_files import newest_whole

NUM_STEPS, PAGE = 12, 4096
# A disk of its own for one command; what is on it is copied away before it goes.
SCRIPT = 'mount -t tmpfs -o size="$SIZE" none "$DISK" && { "$@"; status=$?; cp -r "$DISK" "$KEPT"; exit $status; }'
ALONE = ("unshare", "--map-root-user", "--mount")
RUN = f"""
import sys
sys.path.insert(0, "tests")
import jax
from etils import epath
from multihost_worker import train
from mlcm_jax.cli import run_main
workdir = epath.Path(sys.argv.pop())
run_main(lambda: train(workdir, {NUM_STEPS}, 1, jax.devices()[:1]))
"""


def may_mount(folder: Path) -> bool:
    (folder / "try").mkdir()
    command = [*ALONE, "mount", "-t", "tmpfs", "none", str(folder / "try")]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def pages(folder: Path) -> int:
    """Bytes that its files take on a disk of pages."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return sum(-(-file.stat().st_size // PAGE) * PAGE for file in files)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [1.5, 2.5])
def test_a_full_disk_ends_a_run_that_goes_on_elsewhere(tmp_path, checkpoints):
    if not may_mount(tmp_path):
        pytest.skip("this system does not let a user mount a disk of its own")
    whole, disk, kept = tmp_path / "whole", tmp_path / "disk", tmp_path / "kept"
    train(epath.Path(whole), NUM_STEPS, 1, jax.devices()[:1])
    disk.mkdir()
    size = checkpoints * pages(whole / "checkpoints" / str(NUM_STEPS)) + pages(whole / "tb") + 2 * PAGE
    env = os.environ | {"JAX_PLATFORMS": "cpu", "SIZE": str(int(size)), "DISK": str(disk), "KEPT": str(kept)}
    command = [*ALONE, "sh", "-c", SCRIPT, "sh", sys.executable, "-c", RUN, str(disk / "run")]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr[-3000:]
    (sentence,) = re.findall(r"^error: .*", result.stderr, re.MULTILINE)
    assert re.search(r"cannot be written \(No space left on device\): make room", sentence), sentence
    step, damaged = newest_whole(kept / "run" / "checkpoints")
    assert step is not None and not damaged
    train(epath.Path(kept / "run"), NUM_STEPS, 1, jax.devices()[:1])
    assert losses(kept / "run") == losses(whole)
    assert os.listdir(disk) == []
