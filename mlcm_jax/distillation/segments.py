"""The M segments that the timesteps 999..0 are cut into, and the timesteps drawn inside them.

A segment runs from its upper boundary down to its lower one. A boundary belongs to the segment that begins there, so a
segment holds the timesteps lower < t <= upper. The boundaries are the timesteps that diffusers' TCDScheduler visits
with ``original_inference_steps=1000``: a student is sampled where it was trained (arXiv 2406.05768).

Every function but ``boundaries`` takes traced integers, so that M may change within one compiled step.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from mlcm_jax.diffusion.scheduler_config import LAST_TIMESTEP, NUM_TRAIN_TIMESTEPS
from mlcm_jax.errors import UserError
from mlcm_jax.rules import POSITIVE, Rule, between, check_rules, one_of
from mlcm_jax.types import AnyKey, Timesteps

MAX_SEGMENTS = 100  # more would leave a segment fewer than 10 timesteps
IntLike = int | Int[Array, ""]


def check(config: ConfigDict) -> None:
    """Raise UserError for settings of segments and of the timesteps in them that cannot work."""
    rules = {
        "num_segments": between(1, MAX_SEGMENTS),
        "timesteps": one_of("uniform", "milestones", "grid"),
        "skip": POSITIVE,
        "skip_end": between(0, min(config.skip, LAST_TIMESTEP)),
    }
    check_rules(config, rules)
    if config.timesteps == "grid":
        multiple = Rule(
            lambda v: 0 < v < LAST_TIMESTEP and v % config.num_segments == 0,
            f"a multiple of num_segments={config.num_segments} below {LAST_TIMESTEP} with timesteps='grid'",
        )
        check_rules(config, {"grid": multiple})


def boundaries(num_segments: int) -> Int[np.ndarray, " boundaries"]:
    """All M + 1 boundaries from 999 down to 0: boundary_i = 999 - floor(1000 i / M), then 0.

    Raises UserError unless 1 <= num_segments <= 999.
    """
    if not 1 <= num_segments <= LAST_TIMESTEP:
        raise UserError(f"num_segments={num_segments} is not possible: choose 1 to {LAST_TIMESTEP}.")
    i = np.arange(num_segments, dtype=np.int32)
    return np.append(LAST_TIMESTEP - NUM_TRAIN_TIMESTEPS * i // num_segments, np.int32(0))


def segment_boundaries(
    segment: int | Int[Array, "*n"], num_segments: IntLike
) -> tuple[Int[Array, "*n"], Int[Array, "*n"]]:
    """(upper, lower) boundary of segment 0..M-1; segment 0 begins at pure noise, t = 999."""
    segment = jnp.asarray(segment)
    upper = LAST_TIMESTEP - NUM_TRAIN_TIMESTEPS * segment // num_segments
    lower = LAST_TIMESTEP - NUM_TRAIN_TIMESTEPS * (segment + 1) // num_segments
    return upper, jnp.maximum(lower, 0)


def width(t: Timesteps, num_segments: IntLike) -> Timesteps:
    """Timesteps in a segment, 1000 / M rounded down, for each example."""
    return jnp.full_like(t, NUM_TRAIN_TIMESTEPS // num_segments)


def draw_timesteps(rng: AnyKey, segment: Int[Array, " n"], num_segments: IntLike) -> Timesteps:
    """One timestep for each example, uniform over lower < t <= upper of its segment."""
    upper, lower = segment_boundaries(segment, num_segments)
    return jax.random.randint(rng, segment.shape, lower + 1, upper + 1)


def draw_from_grid(rng: AnyKey, segment: Int[Array, " n"], num_segments: IntLike, grid: int) -> Timesteps:
    """One timestep for each example among the upper boundaries of the grid's segments that lie in its own."""
    each = grid // num_segments
    place = jax.random.randint(rng, segment.shape, 0, each)
    return segment_boundaries(segment * each + place, grid)[0]


def segment_of(t: Timesteps, num_segments: IntLike) -> Int[Array, " n"]:
    """The segment with lower < t <= upper."""
    return (num_segments * (NUM_TRAIN_TIMESTEPS - t) - 1) // NUM_TRAIN_TIMESTEPS


def steps_to_first_segment(timesteps: str) -> int:
    """The teacher's solver steps from pure noise to a state of segment 0: one to a "uniform" time in it, none to
    "milestones", since the noise lies on the segment's upper boundary; each further segment takes one more."""
    return 0 if timesteps == "milestones" else 1


def annealed_skip(config: ConfigDict, step: IntLike) -> IntLike:
    """``skip`` after ``step`` finished updates: it falls to ``skip_end`` exponentially over the first half of the run,
    as MCM's teacher takes 64 to 1280 steps (arXiv 2403.06807, sec. 4); without ``skip_end`` it stays."""
    if not config.skip_end:
        return config.skip
    share = jnp.minimum(2 * jnp.asarray(step) / config.num_steps, 1.0)
    return jnp.round(config.skip * (config.skip_end / config.skip) ** share).astype(jnp.int32)


def short_step(t: Timesteps, skip: IntLike, lower: Timesteps) -> Timesteps:
    """Where the teacher's step from t ends: ``skip`` timesteps on, but never below the segment's lower boundary."""
    return jnp.maximum(t - skip, lower)
