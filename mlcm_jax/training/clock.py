"""The seconds that steps take, measured without keeping the device waiting."""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax

SLOW = 10  # times the median
ENOUGH = 5  # steps for a median


class Rate(NamedTuple):
    """Means over steps. seconds: of a step, without what was set aside. waited: seconds of them for the batch."""

    seconds: float
    flops: float
    waited: float


class StepClock:
    """Counts a step when it is finished. It is waited for after the next one is queued, so that a device never idles.

    The first step, which sets things up, is not counted, nor is what happens inside ``aside``.
    """

    def __init__(self):
        self._queued: Any = None  # what the step that is under way results in
        self._flops = self._waited = 0.0  # of that step
        self._mark: float | None = None  # when the one before it was finished
        self._recent: deque[float] = deque(maxlen=100)  # seconds
        self._counted: list[Rate] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """In here the next step's batch is waited for."""
        start = time.perf_counter()
        yield
        self._waited = time.perf_counter() - start

    def queued(self, result: Any, flops: float) -> str | None:
        """A step is on its way to ``result``. Returns some words about the one before where it took very long."""
        waited = self._waited
        words = self._finish()
        self._queued, self._flops, self._waited = result, flops, waited
        return words

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Seconds in here are no step's."""
        self._finish()
        yield
        self._mark = None if self._mark is None else time.perf_counter()

    def rate(self) -> Rate | None:
        """Of the steps since the last call, the one under way included, which is waited for; None when none counts."""
        self._finish()
        counted, self._counted = self._counted, []
        return Rate(*(statistics.fmean(values) for values in zip(*counted, strict=True))) if counted else None

    def _finish(self) -> str | None:
        if self._queued is None:
            return None
        jax.block_until_ready(self._queued)
        before, self._mark, self._queued = self._mark, time.perf_counter(), None
        if before is None:
            return None
        seconds = self._mark - before
        self._counted.append(Rate(seconds, self._flops, self._waited))
        usual = statistics.median(self._recent) if len(self._recent) >= ENOUGH else None
        self._recent.append(seconds)
        if usual is None or seconds < SLOW * usual:
            return None
        return f"{seconds:.3g} s, {seconds / usual:.0f} times the median"
