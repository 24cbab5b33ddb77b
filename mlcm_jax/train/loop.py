"""The loop around any train step: resume, log, sample, checkpoint; it knows nothing of what is trained."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mlcm_jax.checkpoint import Checkpoints
from mlcm_jax.errors import UserError
from mlcm_jax.train.metrics import MetricWriter, progress_bar
from mlcm_jax.train.state import TrainState

StepFn = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
BatchFn = Callable[[int], Any]
SampleFn = Callable[[TrainState], np.ndarray]


def run(
    state: TrainState,
    step_fn: StepFn,
    batch_fn: BatchFn,
    config: ConfigDict,
    workdir: Path,
    *,
    sample_fn: SampleFn | None = None,
) -> TrainState:
    """Train to ``config.num_steps`` from the newest checkpoint of ``workdir``, else from ``state``.

    step_fn: jit-ed (state, batch) -> (state, metrics with "loss"). batch_fn: the batch of a step, as a pure function
    of the step, so that a resumed run sees what the killed one would have. sample_fn: a picture, uint8 [H, W, 3],
    written to workdir/samples every ``sample_every`` steps.
    SIGTERM (a pre-emption) saves a checkpoint and ends the run. Raises UserError when the loss is not finite.
    """
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)
    restored = checkpoints.restore(state)
    state = state if restored is None else restored
    start = int(state.step)
    writer = MetricWriter(workdir, start_step=start)
    stop = _StopOnSignal()
    window_start, window_steps = time.perf_counter(), 0
    with progress_bar(config.num_steps, start) as bar:
        for step in range(start + 1, config.num_steps + 1):
            state, metrics = step_fn(state, batch_fn(step - 1))
            window_steps += 1
            stopping = stop.requested  # read once: a signal that comes later in this step ends the next one
            last = step == config.num_steps or stopping
            save = step % config.checkpoint_every == 0 or last
            if step % config.log_every == 0 or save or step == start + 1:
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                _require_finite(values, step, workdir)
                rate = window_steps * config.batch_size / (time.perf_counter() - window_start)
                bar.set_postfix(loss=f"{values['loss']:.4g}", examples_per_s=f"{rate:.1f}")
                bar.update(step - bar.n)
                if step % config.log_every == 0 or last:
                    writer.write(step, {**values, "examples_per_second": rate})
                    window_start, window_steps = time.perf_counter(), 0
            if save:
                checkpoints.save(state, step)
            if sample_fn and (step % config.sample_every == 0 or last):
                _write_sample(sample_fn(state), step, workdir, writer)
            if stopping:
                break
    checkpoints.close()
    writer.close()
    stop.restore()
    if stop.requested:
        raise SystemExit(f"Stopped by a signal at step {int(state.step)}: run the same command to go on.")
    return state


def _write_sample(image: np.ndarray, step: int, workdir: Path, writer: MetricWriter) -> None:
    from PIL import Image

    folder = workdir / "samples"
    folder.mkdir(exist_ok=True)
    Image.fromarray(image).save(folder / f"step_{step:06d}.png")
    writer.image(step, "samples", image)


def _require_finite(values: dict[str, float], step: int, workdir: Path) -> None:
    if not np.isfinite(values["loss"]):
        raise UserError(
            f"The loss is {values['loss']} at step {step}: lower optim.learning_rate and start again; "
            f"the checkpoints before it are whole in {workdir / 'checkpoints'}."
        )


class _StopOnSignal:
    """Remembers SIGTERM, which a pre-empted machine gets some seconds before it goes."""

    def __init__(self):
        self.requested = False
        self._previous = signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, *_):
        self.requested = True

    def restore(self):
        signal.signal(signal.SIGTERM, self._previous)
