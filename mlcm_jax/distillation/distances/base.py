"""What a distance between two answers is."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.frozen_networks import Load
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.types import Latents, Params, Timesteps


class Answers(NamedTuple):
    """The student's answer at timestep t and the target, both at the target's place; boundary: the segment's lower."""

    prediction: Latents
    target: Latents
    t: Timesteps
    boundary: Timesteps


def _nothing(*_: Any) -> Any:
    return {}


@dataclasses.dataclass(frozen=True)
class Distance:
    """measure: (context, answers, weights of the frozen networks) -> one float32 number an example.

    check: raises UserError for settings that cannot work. networks: (config, the teacher's pipeline in shapes) -> the
    frozen networks that it asks, by role.
    """

    measure: Callable[[DistillationContext, Answers, Mapping[str, Params]], Float[Array, " n"]]
    check: Callable[[ConfigDict], Any] = _nothing
    networks: Callable[[ConfigDict, Pipeline], Mapping[str, Load]] = _nothing
