"""Where training states come from, by the names that ``config.states`` takes."""

from ml_collections import ConfigDict

from mlcm_jax.diffusion.solvers import SOLVERS
from mlcm_jax.distillation.states.base import Draws, Placement, SourceContext, States, StateSource
from mlcm_jax.distillation.states.data import Data
from mlcm_jax.distillation.states.mds import MultistepDenoising
from mlcm_jax.distillation.states.simulation import Simulation, SimulationWithData
from mlcm_jax.distillation.states.streaming import Streaming, empty_buffer
from mlcm_jax.distillation.states.student import Student
from mlcm_jax.errors import UserError
from mlcm_jax.rules import NOT_NEGATIVE, check_rules, one_of

STATE_SOURCES: dict[str, StateSource] = {
    "streaming": Streaming(),
    "mds": MultistepDenoising(),
    "data": Data(),
    "student": Student(),
    "simulation": Simulation(),
    "simulation_data": SimulationWithData(),
}

__all__ = [
    "STATE_SOURCES", "Draws", "Placement", "SourceContext", "StateSource", "States", "check", "empty_buffer",
]  # fmt: skip


def check(config: ConfigDict) -> None:
    """Raise UserError for settings of the source that cannot work."""
    check_rules(config, {"states": one_of(*STATE_SOURCES), "noise_offset": NOT_NEGATIVE})
    source = STATE_SOURCES[config.states]
    source.check(config)
    if config.noise_offset and not (source.gives_clean and source.makes_target):
        raise UserError(
            f"config.noise_offset needs states of noised latents, which states={config.states!r} does not give: set it "
            "to 0."
        )
    solver = SOLVERS[config.target_solver]
    if (solver.needs_clean or solver.adds_noise) and not source.gives_clean:
        raise UserError(
            f"config.target_solver={config.target_solver!r} needs clean latents that were noised, and "
            f"states={config.states!r} has none: use ddim or addim."
        )
