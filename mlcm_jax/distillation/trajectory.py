"""The teacher's own sampling trajectories: guided solver steps between traced timesteps (arXiv 2406.05768, sec. 4)."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key
from ml_collections import ConfigDict

from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.diffusion.scheduler_config import LAST_TIMESTEP
from mlcm_jax.diffusion.solvers import DDIM, SOLVERS, Solver
from mlcm_jax.rules import POSITIVE, between, check_rules, one_of
from mlcm_jax.types import Latents, Timesteps

# prediction of the clean latents: (latents, timesteps) -> x0
PredictX0 = Callable[[Latents, Timesteps], Latents]


def check(config: ConfigDict) -> None:
    """Raise UserError for settings of the teacher's solver that cannot work."""
    rules = {
        "trajectory_solver": one_of(*(name for name, s in SOLVERS.items() if not (s.needs_clean or s.adds_noise))),
        "target_solver": one_of(*(name for name, solver in SOLVERS.items() if not solver.uses_previous)),
        "target_noise": between(0, 1),
        "solver_steps": POSITIVE,
        "guidance_scale": POSITIVE,
    }
    check_rules(config, rules)


def equal_steps(t: Timesteps, s: Timesteps, num_steps: int | Int[Array, ""], length: int) -> Int[Array, "length n"]:
    """``num_steps`` equal steps from t to s as the times they visit, t first; what follows the last one repeats s."""
    j = jnp.minimum(jnp.arange(length, dtype=jnp.int32), num_steps)[:, None]
    return t[None] - (t - s)[None] * j // jnp.maximum(num_steps, 1)


def trajectory_timesteps(
    t_m: Timesteps, t_n: Timesteps, num_steps: Int[Array, ""], max_steps: int, num_substeps: int = 1
) -> Int[Array, "times n"]:
    """The times of a trajectory: 999, then ``num_steps`` equal steps to t_m, then ``num_substeps`` more to t_n.
    Without steps t_m is 999 itself.

    What follows repeats t_n; there are max_steps + num_substeps + 1 times, so that shapes do not depend on num_steps.
    """
    length = max_steps + num_substeps + 1
    j = jnp.arange(length, dtype=jnp.int32)[:, None]
    to_state = equal_steps(jnp.full_like(t_m, LAST_TIMESTEP), t_m, num_steps, length)
    short = t_m[None] - (t_m - t_n)[None] * jnp.clip(j - num_steps, 0, num_substeps) // num_substeps
    return jnp.where(j <= num_steps, to_state, short)


def integrate(
    predict_x0: PredictX0,
    schedule: Schedule,
    z: Latents,
    timesteps: Int[Array, "times n"],
    num_steps: int | Int[Array, ""],
    num_substeps: int = 1,
    *,
    solver: Solver = DDIM,
    target_solver: Solver = DDIM,
    noise_key: Key[Array, ""] | None = None,
) -> tuple[Latents, Latents]:
    """Solver steps from time to time of ``timesteps``: the states after ``num_steps`` of them and after all.

    The steps lead to the training state z_m, the substeps from there to z_n: one loop serves both, so that a compiled
    program holds the network once. num_steps may be traced: only the steps that are needed run.
    solver: of the steps. target_solver: of the substeps; it reads no earlier prediction. noise_key: of the fresh noise
    of one that adds some.
    """

    def step(j, states):
        z_m, z, x0_prev, t_prev = states
        t, s = timesteps[j], timesteps[j + 1]
        x0 = predict_x0(z, t)
        z_m = jnp.where(j == num_steps, z, z_m)
        known = (j > 0) & (j < num_steps)
        following = solver.step(schedule, z, x0, x0_prev, jnp.where(known, t_prev, t), t, s)
        if target_solver != solver:
            fresh = {}
            if target_solver.adds_noise:
                fresh["noise"] = jax.random.normal(jax.random.fold_in(cast(Any, noise_key), j), z.shape)
            short = target_solver.step(schedule, z, x0, x0, t, t, s, **fresh)
            following = jnp.where(j < num_steps, following, short)
        z = following
        # A solver without memory never touches the last two of the loop's values.
        return (z_m, z, x0, t) if solver.uses_previous else (z_m, z, x0_prev, t_prev)

    z_m, z_n, *_ = jax.lax.fori_loop(0, num_steps + num_substeps, step, (z, z, z, timesteps[0]))
    return z_m, z_n
