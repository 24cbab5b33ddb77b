"""The teacher's own sampling trajectories: guided solver steps between traced timesteps (arXiv 2406.05768, sec. 4)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.diffusion.solvers import ddim_step, dpmpp_2m_step
from mlcm_jax.distillation.segments import LAST_TIMESTEP
from mlcm_jax.types import Latents, Timesteps

# prediction of the clean latents: (latents, timesteps) -> x0
PredictX0 = Callable[[Latents, Timesteps], Latents]


def equal_jumps(t: Timesteps, s: Timesteps, num_jumps: int | Int[Array, ""], rows: int) -> Int[Array, "rows n"]:
    """``num_jumps`` equal jumps from t to s as the times they visit, t first; rows after the last jump repeat s."""
    j = jnp.minimum(jnp.arange(rows, dtype=jnp.int32), num_jumps)[:, None]
    return t[None] - (t - s)[None] * j // jnp.maximum(num_jumps, 1)


def denoising_timesteps(
    t_m: Timesteps, t_n: Timesteps, num_jumps: Int[Array, ""], max_jumps: int, num_substeps: int = 1
) -> Int[Array, "times n"]:
    """The times of a trajectory: 999, then ``num_jumps`` equal jumps to t_m, then ``num_substeps`` more to t_n.
    Without jumps t_m is 999 itself.

    Rows after those repeat t_n; there are max_jumps + num_substeps + 1, so that shapes do not depend on num_jumps.
    """
    rows = max_jumps + num_substeps + 1
    j = jnp.arange(rows, dtype=jnp.int32)[:, None]
    to_state = equal_jumps(jnp.full_like(t_m, LAST_TIMESTEP), t_m, num_jumps, rows)
    short = t_m[None] - (t_m - t_n)[None] * jnp.clip(j - num_jumps, 0, num_substeps) // num_substeps
    return jnp.where(j <= num_jumps, to_state, short)


def walk(
    predict_x0: PredictX0,
    schedule: Schedule,
    z: Latents,
    timesteps: Int[Array, "times n"],
    num_jumps: int | Int[Array, ""],
    num_substeps: int = 1,
    *,
    second_order: bool = False,
) -> tuple[Latents, Latents]:
    """Solver steps along the rows of ``timesteps``: the states after ``num_jumps`` of them and after all.

    The jumps lead to the training state z_m, the substeps from there to z_n: one loop serves both, so that a compiled
    program holds the network once. num_jumps may be traced: only the jumps that are needed run.
    second_order: jumps by DPM-Solver++ 2M instead of DDIM; the substeps are DDIM always.
    """

    def jump(j, states):
        z_m, z, x0_prev, t_prev = states
        t, s = timesteps[j], timesteps[j + 1]
        x0 = predict_x0(z, t)
        z_m = jnp.where(j == num_jumps, z, z_m)
        if not second_order:
            return z_m, ddim_step(schedule, z, x0, t, s), x0_prev, t_prev
        known = (j > 0) & (j < num_jumps)
        z = dpmpp_2m_step(schedule, z, x0, x0_prev, jnp.where(known, t_prev, t), t, s)
        return z_m, z, x0, t

    # Without a second order the last two of the loop's values are never touched.
    z_m, z_n, *_ = jax.lax.fori_loop(0, num_jumps + num_substeps, jump, (z, z, z, timesteps[0]))
    return z_m, z_n
