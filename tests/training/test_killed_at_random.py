"""The reliability campaign: a run with stages, an average and a critic, killed twenty times, against a whole one."""

import json
import signal
import time

import numpy as np
import pytest
from programs import Programs, saved_steps
from tiny_models import ONE_LEVEL_XL, save_sdxl

from mlcm_jax.training.metrics import read_metrics

KILLS, NUM_STEPS = 20, 90
SPEEDS = ("examples_per_second", "tflops_per_second", "data_wait_seconds", "peak_memory_gb")  # of the machine
SETTINGS = {
    "num_steps": NUM_STEPS,
    "checkpoint_every": 3,
    "sample_every": 1000,
    "ema_decay": 0.9,
    "distribution_matching.weight": 0.5,
    "stages": '({"start": 30, "num_segments": 2}, {"start": 60, "states": "student", "target": "x0"})',
}


def curve(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in SPEEDS} for line in lines]


def last_step(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def kill(process, workdir, moment) -> bool:
    """Kill -9 some steps and a part of a second on, or some seconds after the start; False: it had ended before."""
    begin, first = time.monotonic(), last_step(workdir)
    starting, wanted = moment.random() < 0.25, first + moment.integers(1, 7)
    seconds = moment.uniform(0, 15)
    while process.poll() is None:
        if starting and time.monotonic() - begin > seconds:
            break
        lines = read_metrics(workdir / "metrics.jsonl")
        written = lines[-1]["step"] if lines else 0
        if not starting and (written < first or written >= wanted):  # lines after the checkpoint are dropped at a start
            time.sleep(moment.uniform(0, 0.4))
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    (tmp_path / "teacher").mkdir()
    programs = Programs(tmp_path, save_sdxl(tmp_path / "teacher", ONE_LEVEL_XL, gain=10.0))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    programs.run("train", *programs.train_args(whole, **SETTINGS))
    args, moment, at = programs.train_args(killed, **SETTINGS), np.random.default_rng(2026), []
    while len(at) < KILLS:
        process = programs.start("train", *args)
        assert kill(process, killed, moment), process.communicate()[1][-3000:]
        at.append(last_step(killed))
        print(f"kill {len(at)}: step {at[-1]}, checkpoints {saved_steps(killed) if at[-1] else []}", flush=True)
    out, _ = programs.run("train", *args)
    assert "skipped" not in out, "a kill leaves whole checkpoints"
    assert len({step for step in at if step}) > KILLS // 3, "the kills fell on many steps"
    ours, theirs = curve(killed), curve(whole)
    assert [line["step"] for line in theirs] == list(range(1, NUM_STEPS + 1))
    assert ours == theirs, "every step once, and to the bit"
    files = sorted(file.relative_to(whole) for file in (whole / "export").rglob("*") if file.is_file())
    for file in [*files, *(f"samples/{name}.png" for name in ("final", "closeness"))]:
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    assert json.loads((killed / "results.json").read_text()) == json.loads((whole / "results.json").read_text())
    assert sorted(p.name for p in (killed / "checkpoints").iterdir()) == ["87", "90"]
