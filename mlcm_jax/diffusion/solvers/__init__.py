"""Steps of the probability flow ODE and of the reverse SDE, by the names that ``trajectory_solver`` and
``target_solver`` take."""

from mlcm_jax.diffusion.solvers.addim import ADDIM, ADDIM_DATA, addim_step
from mlcm_jax.diffusion.solvers.base import Solver
from mlcm_jax.diffusion.solvers.ddim import DDIM, ddim_step, ddim_weights
from mlcm_jax.diffusion.solvers.dpmpp_2m import DPMPP_2M, dpmpp_2m_step
from mlcm_jax.diffusion.solvers.stochastic import DDIM_SDE, ER_SDE

SOLVERS: dict[str, Solver] = {
    "ddim": DDIM,
    "dpmpp_2m": DPMPP_2M,
    "addim": ADDIM,
    "addim_data": ADDIM_DATA,
    "ddim_sde": DDIM_SDE,
    "er_sde": ER_SDE,
}

__all__ = ["DDIM", "SOLVERS", "Solver", "addim_step", "ddim_step", "ddim_weights", "dpmpp_2m_step"]
