"""What a solver of the probability flow ODE is. All arithmetic is float32, between traced integer timesteps."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Solver(NamedTuple):
    """step: (schedule, z, x0, x0_prev, t_prev, t, s) -> z at s, where x0 is predicted at t and x0_prev at t_prev >= t
    (t_prev == t: there is no earlier prediction). uses_previous: whether x0_prev and t_prev are read."""

    step: Callable[..., Any]
    uses_previous: bool
