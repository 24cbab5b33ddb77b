"""Training states without data: points on the teacher's own sampling trajectory (MLCM, arXiv 2406.05768, sec. 4)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.diffusion.solvers import ddim_step
from mlcm_jax.distill.segments import LAST_TIMESTEP
from mlcm_jax.types import Latents, Timesteps

# guided prediction of the clean latents: (latents, timesteps) -> x0
PredictX0 = Callable[[Latents, Timesteps], Latents]


def denoising_timesteps(
    t_m: Timesteps, t_n: Timesteps, num_jumps: Int[Array, ""], max_jumps: int
) -> Int[Array, "jumps n"]:
    """The times that a trajectory visits: 999, then ``num_jumps`` equal jumps to t_m, and one more to t_n.

    Rows after those repeat t_n; there are max_jumps + 2 rows, so that shapes do not depend on num_jumps.
    """
    j = jnp.arange(max_jumps + 2, dtype=jnp.int32)[:, None]
    to_state = LAST_TIMESTEP - (LAST_TIMESTEP - t_m)[None, :] * jnp.minimum(j, num_jumps) // num_jumps
    return jnp.where(j <= num_jumps, to_state, t_n[None, :])


def multistep_denoising(
    predict_x0: PredictX0,
    schedule: Schedule,
    noise: Latents,
    timesteps: Int[Array, "jumps n"],
    num_jumps: Int[Array, ""],
) -> tuple[Latents, Latents]:
    """The last two states of a guided DDIM trajectory from pure noise: z_m at t_m and z_n at t_n.

    The multistep denoising strategy: states of the noisier segments are few jumps from the noise, those of the
    cleaner ones many. The jump from t_m to t_n is the teacher's step Psi, so one loop serves both. ``num_jumps`` may
    be traced: only the jumps that are needed run.
    """

    def jump(j, states):
        _, z = states
        t, s = timesteps[j], timesteps[j + 1]
        return z, ddim_step(schedule, z, predict_x0(z, t), t, s)

    return jax.lax.fori_loop(0, num_jumps + 1, jump, (noise, noise))
