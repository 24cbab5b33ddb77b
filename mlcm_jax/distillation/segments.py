"""The M segments that the timesteps 999..0 are cut into, and the timesteps drawn inside them.

A segment runs from its upper edge down to its lower edge. An edge belongs to the segment that begins there, so a
segment holds the timesteps lower < t <= upper. The edges are the timesteps that diffusers' TCDScheduler visits with
``original_inference_steps=1000``: a student is sampled where it was trained (arXiv 2406.05768).

Every function but ``edges`` takes traced integers, so that M may change within one compiled step.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, UInt32

from mlcm_jax.errors import UserError
from mlcm_jax.types import Timesteps

LAST_TIMESTEP = 999
NUM_TIMESTEPS = 1000
MAX_SEGMENTS = 100  # more would leave a segment fewer than 10 timesteps
IntLike = int | Int[Array, ""]
AnyKey = Key[Array, ""] | UInt32[Array, "2"]


def edges(num_segments: int) -> Int[np.ndarray, " edges"]:
    """All M + 1 edges from 999 down to 0: edge_i = 999 - floor(1000 i / M), then 0.

    Raises UserError unless 1 <= num_segments <= 999.
    """
    if not 1 <= num_segments <= LAST_TIMESTEP:
        raise UserError(f"num_segments={num_segments} is not possible: choose 1 to {LAST_TIMESTEP}.")
    i = np.arange(num_segments, dtype=np.int32)
    return np.append(LAST_TIMESTEP - NUM_TIMESTEPS * i // num_segments, np.int32(0))


def segment_edges(segment: int | Int[Array, "*n"], num_segments: IntLike) -> tuple[Int[Array, "*n"], Int[Array, "*n"]]:
    """(upper, lower) edge of segment 0..M-1; segment 0 begins at pure noise, t = 999."""
    segment = jnp.asarray(segment)
    upper = LAST_TIMESTEP - NUM_TIMESTEPS * segment // num_segments
    lower = LAST_TIMESTEP - NUM_TIMESTEPS * (segment + 1) // num_segments
    return upper, jnp.maximum(lower, 0)


def segment_of(t: Timesteps, num_segments: IntLike) -> Timesteps:
    """The segment with lower < t <= upper; t = 0, which only ends a segment, counts to the last one."""
    return (num_segments * (NUM_TIMESTEPS - t) - 1) // NUM_TIMESTEPS


def draw_timesteps(rng: AnyKey, segment: Int[Array, " n"], num_segments: IntLike) -> Timesteps:
    """One timestep for each example, uniform over lower < t <= upper of its segment."""
    upper, lower = segment_edges(segment, num_segments)
    return jax.random.randint(rng, segment.shape, lower + 1, upper + 1)


def jumps_to_first_segment(timesteps: str) -> int:
    """The teacher's jumps from pure noise to a state of segment 0: one to a "uniform" time in it, none to "milestones",
    since the noise lies on the segment's upper edge; each further segment takes one more."""
    return 0 if timesteps == "milestones" else 1


def short_step(t: Timesteps, skip: IntLike, lower: Timesteps) -> Timesteps:
    """Where the teacher's step from t ends: ``skip`` timesteps on, but never below the segment's lower edge."""
    return jnp.maximum(t - skip, lower)
