"""When a scorer is exploited: its score rises while that of the guard, a judge that is not learnt from, falls."""

from collections.abc import Mapping
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from mlcm_jax.parallel.distributed import say
from mlcm_jax.training.loop import StopFn
from mlcm_jax.training.metrics import read_metrics

SCORER, GUARD = "preference_score", "preference_guard"  # their names among the metrics
DECAY = 0.9  # of the running means over logged steps: a batch's mean score scatters
SETTLED = 10  # logged steps from which on the means are looked at


class Means(NamedTuple):
    """Running means of both scores up to a step."""

    step: int
    scorer: float
    guard: float


def stop_rule(config: ConfigDict, metrics: epath.Path) -> StopFn | None:
    """What ``loop.run`` takes as its stop_fn: the limit of the configuration, with a sentence; None where it has none.

    metrics: as ``GuardWatch`` takes it.
    """
    allowed = config.preference.stop_when_guard_falls
    if not allowed:
        return None
    watch = GuardWatch(allowed, metrics)

    def stop(step: int, values: Mapping[str, float]) -> int | None:
        best = watch(step, values)
        if best is None:
            return None
        say(
            f"\nStopped at step {step}: the guard's score fell by more than {allowed} below its best, {best.guard:.4g} "
            f"at step {best.step}, while the scorer's rose. What stays is the last checkpoint up to that step."
        )
        return best.step

    return stop


class GuardWatch:
    """Finds the step from which a run should go no further, as its metrics come in.

    The guard's running mean may fall by ``allowed``, in the guard's own units, below its best while the scorer's is
    above what it was there. metrics: a metrics.jsonl, whose earlier steps count too, so that a resumed run stops where
    an uninterrupted one does.
    """

    def __init__(self, allowed: float, metrics: epath.Path):
        self._allowed, self._metrics = allowed, metrics
        self._count, self._sums, self._best, self._begun = 0, (0.0, 0.0), None, False

    def __call__(self, step: int, values: Mapping[str, float]) -> Means | None:
        """The means at the guard's best when the limit is passed at this logged step, else None."""
        if not self._begun:
            self._begun = True
            for earlier in read_metrics(self._metrics):
                if earlier["step"] < step:
                    self._advance(int(earlier["step"]), earlier)
        return self._advance(step, values)

    def _advance(self, step: int, values: Mapping[str, float]) -> Means | None:
        if SCORER not in values or GUARD not in values:
            return None
        self._count += 1
        pairs = zip(self._sums, (values[SCORER], values[GUARD]), strict=True)
        scorer, guard = self._sums = tuple(DECAY * total + (1 - DECAY) * new for total, new in pairs)
        whole = 1 - DECAY**self._count
        means = Means(step, scorer / whole, guard / whole)
        if self._count < SETTLED:
            return None
        if self._best is None or means.guard > self._best.guard:
            self._best = means
        exploited = self._best.guard - means.guard > self._allowed and means.scorer > self._best.scorer
        return self._best if exploited else None
