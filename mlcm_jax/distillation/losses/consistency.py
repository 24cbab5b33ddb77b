"""The consistency loss: the student's answer for a state against the target a short teacher step on."""

from collections.abc import Mapping
from typing import ClassVar

from ml_collections import ConfigDict

from mlcm_jax.distillation import distances
from mlcm_jax.distillation.distances import DISTANCES, Answers
from mlcm_jax.distillation.frozen_networks import Load
from mlcm_jax.distillation.losses.base import Loss, LossInputs
from mlcm_jax.distillation.states import STATE_SOURCES
from mlcm_jax.hub.pipeline import Pipeline


class Consistency(Loss):
    """Multistep latent consistency distillation (arXiv 2406.05768); computed, and so reported, wherever the states have
    a target."""

    name: ClassVar[str] = "consistency"
    reads_target: ClassVar[bool] = True
    at_every_timestep: ClassVar[bool] = True

    @classmethod
    def is_active(cls, config: ConfigDict) -> bool:
        return STATE_SOURCES[config.states].makes_target

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        super().check(config)
        distances.check(config)

    @classmethod
    def networks(cls, config: ConfigDict, architecture: Pipeline) -> Mapping[str, Load]:
        return DISTANCES[config.distance].networks(config, architecture)

    def __call__(self, critic, inputs: LossInputs):
        examples, distance = inputs.examples, DISTANCES[self.context.config.distance]
        answers = Answers(self.answer(inputs), examples.target, examples.t, examples.boundary)
        return distance.measure(self.context, answers, inputs.frozen.networks).mean(), {}
