"""Where training states come from, by the names that ``config.states`` takes."""

from ml_collections import ConfigDict

from mlcm_jax.distillation.states.base import Draws, Placement, SourceContext, States, StateSource
from mlcm_jax.distillation.states.data import Data
from mlcm_jax.distillation.states.mds import MultistepDenoising
from mlcm_jax.distillation.states.streaming import Streaming, empty_buffer
from mlcm_jax.distillation.states.student import Student
from mlcm_jax.rules import check_rules, one_of

STATE_SOURCES: dict[str, StateSource] = {
    "streaming": Streaming(),
    "mds": MultistepDenoising(),
    "data": Data(),
    "student": Student(),
}

__all__ = [
    "STATE_SOURCES", "Draws", "Placement", "SourceContext", "StateSource", "States", "check", "empty_buffer",
]  # fmt: skip


def check(config: ConfigDict) -> None:
    """Raise UserError for settings of the source that cannot work."""
    check_rules(config, {"states": one_of(*STATE_SOURCES)})
    STATE_SOURCES[config.states].check(config)
