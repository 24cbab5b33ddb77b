"""A trace of a few steps for TensorBoard's profiler or Perfetto."""

import re

import jax
from etils import epath

from mlcm_jax.errors import UserError


class Profile:
    """Traces steps first <= step < stop (1 is the run's first step) into ``folder``."""

    def __init__(self, first: int, stop: int, folder: epath.PathLike):
        self._first, self._stop, self._folder, self._running = first, stop, folder, False

    def begins(self, step: int) -> bool:
        return step == self._first

    def ends(self, step: int, *, last: bool) -> bool:
        return self._running and (step == self._stop - 1 or last)

    def start(self) -> None:
        jax.profiler.start_trace(str(self._folder))
        self._running = True

    def stop(self) -> None:
        """Write the trace; what is still to run on the devices has to be waited for before."""
        jax.profiler.stop_trace()
        self._running = False


def parse_steps(value: str) -> tuple[int, int]:
    """10:13 as (10, 13); raises UserError for what is no such range."""
    match = re.fullmatch(r"(\d+):(\d+)", value)
    if match is None or not 1 <= int(match[1]) < int(match[2]):
        raise UserError(f"--profile_steps={value} is no range: write FIRST:STOP, such as 10:13 for steps 10, 11, 12.")
    return int(match[1]), int(match[2])
