"""When a reward model is exploited: its score rises while that of a held-out one, which is not learnt from, falls."""

from collections.abc import Mapping
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from mlcm_jax.parallel.distributed import say
from mlcm_jax.training.loop import StopFn
from mlcm_jax.training.metrics import read_metrics

REWARD, HELD_OUT = "preference_score", "preference_held_out"  # their names among the metrics
FORMER_HELD_OUT = "preference_guard"  # in metrics of runs that are older than the name
DECAY = 0.9  # of the running means over logged steps: a batch's mean score scatters
SETTLED = 10  # logged steps from which on the means are looked at


class Means(NamedTuple):
    """Running means of both scores up to a step."""

    step: int
    reward: float
    held_out: float


def stop_rule(config: ConfigDict, metrics: epath.Path) -> StopFn | None:
    """What ``loop.run`` takes as its stop_fn: the limit of the configuration, with a sentence; None where it has none.

    metrics: as ``RewardMonitor`` takes it.
    """
    allowed = config.preference.stop_when_held_out_falls
    if not allowed:
        return None
    monitor = RewardMonitor(allowed, metrics)

    def stop(step: int, values: Mapping[str, float]) -> int | None:
        best = monitor(step, values)
        if best is None:
            return None
        say(
            f"\nStopped at step {step}: the held-out score fell by more than {allowed} below its best, "
            f"{best.held_out:.4g} at step {best.step}, while the reward model's rose. What stays is the last "
            "checkpoint up to that step."
        )
        return best.step

    return stop


class RewardMonitor:
    """Finds the step from which a run should go no further, as its metrics come in.

    The held-out score's running mean may fall by ``allowed``, in its own units, below its best while the reward model's
    is above what it was there. metrics: a metrics.jsonl, whose earlier steps count too, so that a resumed run
    stops where an uninterrupted one does.
    """

    def __init__(self, allowed: float, metrics: epath.Path):
        self._allowed, self._metrics = allowed, metrics
        self._count, self._sums, self._best, self._begun = 0, (0.0, 0.0), None, False

    def __call__(self, step: int, values: Mapping[str, float]) -> Means | None:
        """The means at the held-out score's best when the limit is passed at this logged step, else None."""
        if not self._begun:
            self._begun = True
            for earlier in read_metrics(self._metrics):
                if earlier["step"] < step:
                    self._advance(int(earlier["step"]), earlier)
        return self._advance(step, values)

    def _advance(self, step: int, values: Mapping[str, float]) -> Means | None:
        held_out = values.get(HELD_OUT, values.get(FORMER_HELD_OUT))
        if REWARD not in values or held_out is None:
            return None
        self._count += 1
        pairs = zip(self._sums, (values[REWARD], held_out), strict=True)
        reward, held_out = self._sums = tuple(DECAY * total + (1 - DECAY) * new for total, new in pairs)
        whole = 1 - DECAY**self._count
        means = Means(step, reward / whole, held_out / whole)
        if self._count < SETTLED:
            return None
        if self._best is None or means.held_out > self._best.held_out:
            self._best = means
        exploited = self._best.held_out - means.held_out > self._allowed and means.reward > self._best.reward
        return self._best if exploited else None
