"""Single steps of the probability flow ODE, by the names that ``config.trajectory_solver`` takes."""

from mlcm_jax.diffusion.solvers.base import Solver
from mlcm_jax.diffusion.solvers.ddim import DDIM, ddim_step, ddim_weights
from mlcm_jax.diffusion.solvers.dpmpp_2m import DPMPP_2M, dpmpp_2m_step

SOLVERS: dict[str, Solver] = {"ddim": DDIM, "dpmpp_2m": DPMPP_2M}

__all__ = ["DDIM", "SOLVERS", "Solver", "ddim_step", "ddim_weights", "dpmpp_2m_step"]
