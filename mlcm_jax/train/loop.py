"""The loop around any train step: resume, log, sample, checkpoint; it knows nothing of what is trained."""

import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from mlcm_jax.checkpoint import Checkpoints
from mlcm_jax.distributed import is_first
from mlcm_jax.errors import UserError
from mlcm_jax.images import write_image
from mlcm_jax.train.metrics import MetricWriter, progress_bar
from mlcm_jax.train.state import TrainState

# Steps that the host may be ahead of the device: enough to keep it busy, few enough to stop soon after a signal.
MAX_IN_FLIGHT = 2

StepFn = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
BatchFn = Callable[[int], Any]
SampleFn = Callable[[TrainState], np.ndarray]
StopFn = Callable[[int, Mapping[str, float]], int | None]


def run(
    state: TrainState,
    step_fn: StepFn,
    batch_fn: BatchFn,
    config: ConfigDict,
    workdir: epath.Path,
    checkpoints: Checkpoints,
    *,
    sample_fn: SampleFn | None = None,
    stop_fn: StopFn | None = None,
) -> TrainState:
    """Train from ``state`` to ``config.num_steps``.

    step_fn: compiled (state, batch) -> (state, metrics with "loss"). batch_fn: the batch of a step, as a pure function
    of the step, so that a resumed run sees what the killed one would have. sample_fn: a picture, uint8 [H, W, 3],
    written to workdir/samples every ``sample_every`` steps. stop_fn: called with each logged step and its metrics;
    where it returns a step, training ends with the newest checkpoint of at most this one, and later ones are removed.
    SIGTERM (a pre-emption) in any process saves a checkpoint and ends the run in all of them. Raises UserError when the
    loss is not finite.
    """
    start, in_flight = int(state.step), deque()
    with closing(MetricWriter(workdir, start_step=start)) as writer, StopOnSignal() as stop:
        report = Report(config, writer, progress_bar(config.num_steps, start), workdir)
        for step in range(start + 1, config.num_steps + 1):
            state, metrics = step_fn(state, batch_fn(step - 1))
            in_flight.append(metrics["loss"])
            if len(in_flight) > MAX_IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
            stopping = stop.requested(step)  # read once: a signal that comes later in this step ends the next one
            last = step == config.num_steps or stopping
            save = step % config.checkpoint_every == 0 or last
            logged = report.step(step, metrics, show=save or step == start + 1, last=last)
            if stop_fn and logged and (good := stop_fn(step, logged)) is not None:
                return _gone_back(checkpoints, state, good)
            if save:
                checkpoints.save(state, step)
            if sample_fn and (step % config.sample_every == 0 or last) and not stopping:
                _write_sample(sample_fn(state), step, workdir, writer)
            if stopping:
                raise SystemExit(f"Stopped by a signal at step {step}: run the same command to go on.")
    return state


def _gone_back(checkpoints: Checkpoints, state: TrainState, step: int) -> TrainState:
    earlier = checkpoints.go_back(state, step)
    if earlier is None:
        raise UserError(
            f"Training should have ended at step {step}, of which no checkpoint is left: lower config.checkpoint_every "
            "or raise config.keep_checkpoints, and start again."
        )
    return earlier


class Report:
    """Hands the metrics of a step to the progress bar and, every ``log_every`` steps, to the writer."""

    def __init__(self, config: ConfigDict, writer: MetricWriter, bar: tqdm, workdir: epath.Path):
        self._config, self._writer, self._bar, self._workdir = config, writer, bar, workdir
        self._start, self._steps = time.perf_counter(), 0

    def step(self, step: int, metrics: dict[str, jax.Array], *, show: bool, last: bool) -> Mapping[str, float] | None:
        """Fetching metrics waits for the device, so most steps are only counted; returns those of a logged step.

        Raises UserError for a bad loss.
        """
        self._steps += 1
        log = step % self._config.log_every == 0 or last
        if not log and not show:
            return None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        _require_finite(values, step, self._workdir)
        rate = self._steps * self._config.batch_size / (time.perf_counter() - self._start)
        self._bar.set_postfix(loss=f"{values['loss']:.4g}", examples_per_s=f"{rate:.1f}")
        self._bar.update(step - self._bar.n)
        if log:
            self._writer.write(step, {**values, "examples_per_second": rate})
            self._start, self._steps = time.perf_counter(), 0
        if last:
            self._bar.close()
        return values if log else None


def _write_sample(image: np.ndarray, step: int, workdir: epath.Path, writer: MetricWriter) -> None:
    if not is_first():
        return
    folder = workdir / "samples"
    folder.mkdir(exist_ok=True)
    write_image(image, folder / f"step_{step:06d}.png")
    writer.image(step, "samples", image)


def _require_finite(values: dict[str, float], step: int, workdir: epath.Path) -> None:
    if not np.isfinite(values["loss"]):
        raise UserError(
            f"The loss is {values['loss']} at step {step}: to go on from the last whole checkpoint in "
            f"{workdir / 'checkpoints'}, lower --config.optim.learning_rate and add --new_learning_rate."
        )


class StopOnSignal:
    """While it is entered, SIGTERM, which a pre-empted machine gets some seconds before it goes, is remembered.

    Of several processes jax takes the signal, tells the others and names the step at which all stop.
    """

    def __enter__(self) -> "StopOnSignal":
        self._alone, self._received = jax.process_count() == 1, False
        if self._alone:
            self._previous = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, *_):
        if self._alone:
            signal.signal(signal.SIGTERM, self._previous)

    def requested(self, step: int) -> bool:
        """Whether to stop after ``step``; to be asked once at every step."""
        return self._received if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def _remember(self, *_):
        self._received = True
