"""What a solver of the probability flow ODE is. All arithmetic is float32, between traced integer timesteps."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple


class Solver(NamedTuple):
    """step: (schedule, z, x0, x0_prev, t_prev, t, s) -> z at s, where x0 is predicted at t and x0_prev at t_prev >= t
    (t_prev == t: there is no earlier prediction). uses_previous: whether x0_prev and t_prev are read. needs_clean:
    whether step takes ``clean`` as well, the clean latents that were noised to make z: for the target's step alone."""

    step: Callable[..., Any]
    uses_previous: bool
    needs_clean: bool = False

    def knowing(self, clean: Any) -> "Solver":
        """The same where the clean latents of the states are ``clean``, or None."""
        return self._replace(step=partial(self.step, clean=clean), needs_clean=False) if self.needs_clean else self
