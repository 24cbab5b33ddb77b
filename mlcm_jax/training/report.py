"""What a run reports: losses, learning rate, speed, memory, and steps that take very long."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from mlcm_jax.errors import UserError
from mlcm_jax.training.clock import Rate, StepClock
from mlcm_jax.training.flops import peak_flops
from mlcm_jax.training.metrics import MetricWriter
from mlcm_jax.training.profiling import Profile


class Known(NamedTuple):
    """What is known of a step (1 for the first) before it runs. flops: of one device."""

    learning_rate: Callable[[int], Any]
    flops: Callable[[int], float]


class Report:
    """Hands the metrics of a step to the progress bar and, every ``log_every`` steps, to the writer.

    checkpoints: where they are, for the advice after a bad loss.
    """

    def __init__(
        self,
        config: ConfigDict,
        writer: MetricWriter,
        bar: tqdm,
        known: Known,
        profile: Profile | None = None,
        *,
        checkpoints: Any = "",
    ):
        self._config, self._writer, self._bar, self._known, self._profile = config, writer, bar, known, profile
        self._checkpoints, self.clock = checkpoints, StepClock()

    def begins(self, step: int) -> None:
        """A step is about to be queued."""
        if self._profile is not None and self._profile.begins(step):
            with self.clock.aside():
                self._profile.start()

    def step(self, step: int, metrics: dict[str, jax.Array], *, show: bool, last: bool) -> Mapping[str, float] | None:
        """A step is queued. Fetching its metrics waits for the device, so most are only counted; returns those of a
        logged step. Raises UserError for a bad loss.
        """
        words = self.clock.queued(metrics["loss"], self._known.flops(step))
        if words:
            self._bar.write(f"Step {step - 1} took {words}.", file=sys.stderr)
        if self._profile is not None and self._profile.ends(step, last=last):
            with self.clock.aside():
                self._profile.stop()
        log = step % self._config.log_every == 0 or last
        if not log and not show:
            return None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._require_finite(values["loss"], step)
        shown = {"loss": f"{values['loss']:.4g}"}
        if log:
            learning_rate = float(self._known.learning_rate(step))  # compiled at the first one: no step's time
            rate = self.clock.rate()
            speed = {} if rate is None else _speed(rate, self._config.batch_size)
            if rate is not None:
                shown["examples_per_s"] = f"{speed['examples_per_second']:.1f}"
            values |= {"learning_rate": learning_rate, **speed, **_memory()}
            self._writer.write(step, values)
        self._bar.set_postfix(shown)
        self._bar.update(step - self._bar.n)
        if last:
            self._bar.close()
        return values if log else None

    def _require_finite(self, loss: float, step: int) -> None:
        if not np.isfinite(loss):
            raise UserError(
                f"The loss is {loss} at step {step}: to go on from the last whole checkpoint in {self._checkpoints}, "
                "lower --config.optim.learning_rate and add --new_learning_rate."
            )


def _speed(rate: Rate, batch_size: int) -> dict[str, float]:
    """Examples over all devices; floating-point operations of one device, and their share of what it can do."""
    flops_per_second, peak = rate.flops / rate.seconds, peak_flops(jax.local_devices()[0])
    share = {} if peak is None else {"share_of_peak": flops_per_second / peak}
    return {
        "examples_per_second": batch_size / rate.seconds,
        "tflops_per_second": flops_per_second / 1e12,
        "data_wait_seconds": rate.waited,
        **share,
    }


def _memory() -> dict[str, float]:
    """The most that has been in use on this process's first device since the start; nothing on a CPU."""
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {} if peak is None else {"peak_memory_gb": peak / 1e9}
