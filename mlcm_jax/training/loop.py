"""The loop around any train step: resume, log, sample, checkpoint; it knows nothing of what is trained."""

import signal
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mlcm_jax.distillation.state import TrainState
from mlcm_jax.errors import UserError
from mlcm_jax.images import write_image
from mlcm_jax.parallel.distributed import is_first
from mlcm_jax.rules import POSITIVE, check_rules
from mlcm_jax.training.checkpoint import Checkpoints
from mlcm_jax.training.metrics import MetricWriter, progress_bar
from mlcm_jax.training.profiling import Profile
from mlcm_jax.training.report import Known, Report
from mlcm_jax.training.wandb_run import WandbRun

StepFn = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
BatchFn = Callable[[int], Any]
SampleFn = Callable[[TrainState], np.ndarray]
StopFn = Callable[[int, Mapping[str, float]], int | None]


def check(config: ConfigDict) -> None:
    """Raise UserError for settings of the loop that cannot work."""
    keys = ("num_steps", "log_every", "checkpoint_every", "keep_checkpoints", "sample_every")
    check_rules(config, dict.fromkeys(keys, POSITIVE))


def run(
    state: TrainState,
    step_fn: StepFn,
    batch_fn: BatchFn,
    config: ConfigDict,
    workdir: epath.Path,
    checkpoints: Checkpoints,
    *,
    known: Known,
    sample_fn: SampleFn | None = None,
    stop_fn: StopFn | None = None,
    profile: Profile | None = None,
) -> TrainState:
    """Train from ``state`` to ``config.num_steps``.

    step_fn: compiled (state, batch) -> (state, metrics with "loss"). batch_fn: the batch of a step, as a pure function
    of the step, so that a resumed run sees what the killed one would have. sample_fn: an image, uint8 [H, W, 3],
    written to workdir/samples every ``sample_every`` steps. known: of each step before it runs. stop_fn: called with
    each logged step and its metrics; where it returns a step, training ends with the newest checkpoint of at most this
    one, and later ones are removed. profile: steps to trace. The next batch is asked for while a step runs.
    SIGTERM (a pre-emption) in any process saves a checkpoint and ends the run in all of them. Raises UserError when the
    loss is not finite.
    """
    start = int(state.step)
    with closing(_writer(config, workdir, start)) as writer, StopOnSignal() as stop:
        bar, folder = progress_bar(config.num_steps, start), workdir / "checkpoints"
        report = Report(config, writer, bar, known, profile, checkpoints=folder)
        batch = batch_fn(start) if start < config.num_steps else None
        for step in range(start + 1, config.num_steps + 1):
            report.begins(step)
            state, metrics = step_fn(state, batch)
            if step < config.num_steps:
                with report.clock.waiting():
                    batch = batch_fn(step)
            stopping = stop.requested(step)  # read once: a signal that comes later in this step ends the next one
            last = step == config.num_steps or stopping
            save = step % config.checkpoint_every == 0 or last
            logged = report.step(step, metrics, show=save or step == start + 1, last=last)
            if stop_fn and logged and (good := stop_fn(step, logged)) is not None:
                return _gone_back(checkpoints, state, good)
            if save:
                with report.clock.aside():
                    checkpoints.save(state, step)
            if sample_fn and (step % config.sample_every == 0 or last) and not stopping:
                with report.clock.aside():
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


def _writer(config: ConfigDict, workdir: epath.Path, start_step: int) -> MetricWriter:
    wandb = WandbRun(config, workdir) if config.wandb_project and is_first() else None
    return MetricWriter(workdir, start_step=start_step, wandb=wandb)


def _write_sample(image: np.ndarray, step: int, workdir: epath.Path, writer: MetricWriter) -> None:
    if not is_first():
        return
    folder = workdir / "samples"
    folder.mkdir(exist_ok=True)
    write_image(image, folder / f"step_{step:06d}.png")
    writer.image(step, "samples", image)


class StopOnSignal:
    """While it is entered, SIGTERM, which a pre-empted machine gets some seconds before it goes, is remembered.

    Of several processes jax takes the signal, informs the others and names the step at which all stop.
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
