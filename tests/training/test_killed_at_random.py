"""The reliability campaign: a run with stages, an average and a critic, killed twenty times, against a whole one."""

import json
import signal
import time

import numpy as np
import pytest
from forked_programs import start
from programs import Programs, saved_steps
from tiny_models import ONE_LEVEL_XL, save_sdxl

from mlcm_jax.training.metrics import read_metrics

KILLS, NUM_STEPS = 20, 60
SPEEDS = ("examples_per_second", "tflops_per_second", "data_wait_seconds", "peak_memory_gb")  # of the machine
SETTINGS = {
    "num_steps": NUM_STEPS,
    "checkpoint_every": 3,
    "sample_every": 1000,
    "image_size": 16,
    "ema_decay": 0.9,
    "distribution_matching.weight": 0.5,
    "stages": '({"start": 20, "num_segments": 2}, {"start": 40, "states": "student", "target": "x0"})',
}


def curve(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in SPEEDS} for line in lines]


def last_step(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def kill(process, workdir, moment) -> bool:
    """Kill -9 some steps and a part of a second on, or some seconds after the start; False: it had ended before."""
    begin, metrics = time.time(), workdir / "metrics.jsonl"
    at_the_start, seconds = moment.random() < 0.25, moment.uniform(0, 15)
    step = max(saved_steps(workdir) if metrics.exists() else [0], default=0) + moment.integers(1, 7)
    while process.is_alive():
        if at_the_start and time.time() - begin > seconds:
            break
        # A run that goes on writes the file anew, without the lines of later steps than its checkpoint.
        if not at_the_start and metrics.exists() and metrics.stat().st_mtime > begin and last_step(workdir) >= step:
            time.sleep(moment.uniform(0, 0.4))
            break
        time.sleep(0.005)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    (tmp_path / "teacher").mkdir()
    programs = Programs(tmp_path, save_sdxl(tmp_path / "teacher", ONE_LEVEL_XL, gain=10.0))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    log = tmp_path / "log"

    def begin(workdir):
        return start("train", programs.train_args(workdir, **SETTINGS), programs.env, log)

    def finish(workdir):
        process = begin(workdir)
        process.join()
        assert process.exitcode == 0, log.read_text()[-3000:]

    finish(whole)
    moment, at = np.random.default_rng(2026), []
    while len(at) < KILLS:
        assert kill(begin(killed), killed, moment), log.read_text()[-3000:]
        at.append(last_step(killed))
        print(f"kill {len(at)}: step {at[-1]}, checkpoints {saved_steps(killed) if at[-1] else []}", flush=True)
    finish(killed)
    assert "skipped" not in log.read_text(), "a kill leaves whole checkpoints"
    assert len({step for step in at if step}) > KILLS // 3, "the kills fell on many steps"
    ours, theirs = curve(killed), curve(whole)
    assert [line["step"] for line in theirs] == list(range(1, NUM_STEPS + 1))
    assert ours == theirs, "every step once, and to the bit"
    files = sorted(file.relative_to(whole) for file in (whole / "export").rglob("*") if file.is_file())
    for file in [*files, *(f"samples/{name}.png" for name in ("final", "closeness"))]:
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    assert json.loads((killed / "results.json").read_text()) == json.loads((whole / "results.json").read_text())
    assert sorted(p.name for p in (killed / "checkpoints").iterdir()) == ["57", "60"]
