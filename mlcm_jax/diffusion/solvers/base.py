"""What a solver of the probability flow ODE, or of the reverse SDE, is.

All arithmetic is float32, between traced integer timesteps.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple


class Solver(NamedTuple):
    """step: (schedule, z, x0, x0_prev, t_prev, t, s) -> z at s, where x0 is predicted at t and x0_prev at t_prev >= t
    (t_prev == t: there is no earlier prediction). uses_previous: whether x0_prev and t_prev are read. needs_clean:
    whether step takes ``clean`` as well, the clean latents that were noised to make z. adds_noise: whether it takes
    ``noise`` as well, fresh normal noise like z, and its ``strength``, 0 to 1. Both: for the target's step alone."""

    step: Callable[..., Any]
    uses_previous: bool
    needs_clean: bool = False
    adds_noise: bool = False

    def knowing(self, clean: Any) -> "Solver":
        """The same where the clean latents of the states are ``clean``, or None."""
        return self._replace(step=partial(self.step, clean=clean), needs_clean=False) if self.needs_clean else self

    def with_strength(self, strength: float) -> "Solver":
        """The same where noise that it adds has this strength."""
        return self._replace(step=partial(self.step, strength=strength)) if self.adds_noise else self
