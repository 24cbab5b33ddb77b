"""The reliability campaign: a run with stages, an average and a critic, killed at random, against a whole one."""

import json
import signal
import time

import numpy as np
import pytest
from forked_programs import start, start_toy_run
from programs import Programs, saved_steps

from mlcm_jax.training.metrics import read_metrics

KILLS, NUM_STEPS = 20, 90
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


def kill(process, workdir, moment, *, steps: int, seconds: float) -> bool:
    """Kill -9 up to ``steps`` steps and a part of a second after the first checkpoint that this process adds or, one
    time in four, up to ``seconds`` after its start; False: it had ended before.

    Checkpoints are written beside the steps, so the next one is usually half written.
    """
    begin, before, further, step = time.time(), newest(workdir), moment.integers(steps + 1), None
    at_the_start, wait, pause = moment.random() < 0.25, moment.uniform(0, seconds), moment.uniform(0, 0.2)
    while process.is_alive():
        if at_the_start and time.time() - begin > wait:
            break
        if not at_the_start and step is None and newest(workdir) > before:
            step = newest(workdir) + further
        if step is not None and last_step(workdir) >= step:
            time.sleep(pause)
            break
        time.sleep(0.005)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def newest(workdir) -> int:
    return max(saved_steps(workdir) if (workdir / "checkpoints").exists() else [], default=0)


def killed_often(begin, workdir, log, kills=KILLS, **moments) -> None:
    """Start and kill ``kills`` times, then let it end."""
    moment, at = np.random.default_rng(2026), []
    while len(at) < kills:
        assert kill(begin(workdir), workdir, moment, **moments), log.read_text()[-3000:]
        at.append((last_step(workdir), newest(workdir)))
        print(f"kill {len(at)}: step {at[-1][0]}, newest checkpoint {at[-1][1]}", flush=True)
    finish(begin(workdir), log)
    assert "skipped" not in log.read_text(), "a kill leaves whole checkpoints"
    assert len(set(at)) > kills // 2, "the kills fell on many steps, or between many checkpoints"


def finish(process, log) -> None:
    process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]


def assert_same_curve(killed, whole, num_steps) -> None:
    ours, theirs = curve(killed), curve(whole)
    assert [line["step"] for line in theirs] == list(range(1, num_steps + 1))
    assert ours == theirs, "every step once, and to the bit"
    kept = sorted(int(place.name) for place in (killed / "checkpoints").iterdir())
    assert kept == [num_steps - 3, num_steps], "nothing is left behind"


@pytest.mark.parametrize(("kills", "num_steps"), [(2, 30), pytest.param(KILLS, 300, marks=pytest.mark.slow)])
def test_kills_of_the_loop_change_nothing(tmp_path, kills, num_steps):
    """With a denoiser of two matrices: the kills fall among fast steps and saves."""
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    env = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def begin(workdir):
        return start_toy_run(workdir, num_steps, env, log)

    finish(begin(whole), log)
    killed_often(begin, killed, log, kills, steps=num_steps // 30, seconds=5)
    assert_same_curve(killed, whole, num_steps)
    assert (killed / "weights.json").read_bytes() == (whole / "weights.json").read_bytes()


@pytest.mark.slow
def test_twenty_kills_change_nothing(smallest_folder, tmp_path):
    programs = Programs(tmp_path, smallest_folder)
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"

    def begin(workdir):
        return start("launch/train.py", programs.train_args(workdir, **SETTINGS), {}, log)

    finish(begin(whole), log)
    killed_often(begin, killed, log, steps=4, seconds=15)
    assert_same_curve(killed, whole, NUM_STEPS)
    files = sorted(file.relative_to(whole) for file in (whole / "export").rglob("*") if file.is_file())
    for file in [*files, *(f"samples/{name}.png" for name in ("final", "closeness"))]:
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    assert json.loads((killed / "results.json").read_text()) == json.loads((whole / "results.json").read_text())
