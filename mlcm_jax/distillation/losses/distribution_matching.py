"""Distribution matching without data (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867).

The student's clean latents are noised again. Where the teacher and a network that knows the student's own
distribution (the fake score) disagree about what they were, the student moves towards the teacher's answer.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mlcm_jax.diffusion.parameterization import predict_x0_eps, training_target
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.distillation.losses.base import Loss, LossInputs, renoise
from mlcm_jax.distillation.state import student_variables
from mlcm_jax.rules import POSITIVE, check_rules
from mlcm_jax.types import Latents, Timesteps

EXAMPLE = (1, 2, 3)  # axes of one example


class DistributionMatching(Loss):
    """The critic is the fake score: a denoiser, the teacher at first, that learns the student's distribution."""

    name: ClassVar[str] = "distribution_matching"
    has_critic: ClassVar[bool] = True

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        super().check(config)
        check_rules(config, {f"{cls.name}.learning_rate": POSITIVE, f"{cls.name}.updates": POSITIVE})

    def __call__(self, critic, inputs):
        schedule, condition = self.context.schedule, inputs.examples.condition
        z, _, t = renoise(schedule, inputs.key, inputs.x0)
        z = jax.lax.stop_gradient(z)
        fake = predict_x0_eps(schedule, self._output(critic, inputs, z, t), z, t).x0
        real = self.context.teacher_x0(inputs.frozen, condition, z, t)
        return matching_loss(inputs.x0, real, fake).mean(), {}

    def init_critic(self, key, student, shapes):
        return jax.tree.map(jnp.copy, student)

    def critic_loss(self, critic, inputs):
        z, noise, t = renoise(self.context.schedule, inputs.key, inputs.x0)
        output = self._output(critic, inputs, z, t)
        return fake_score_loss(self.context.schedule, output, inputs.x0, noise, t).mean()

    def _output(self, critic, inputs: LossInputs, z: Latents, t: Timesteps) -> Latents:
        variables = student_variables(critic, inputs.frozen.teacher, self.context.config)
        return self.context.student_output(variables, z, t, inputs.examples.condition)


def matching_loss(x0: Latents, real_x0: Latents, fake_x0: Latents) -> Float[Array, " n"]:
    """A loss whose gradient in x0 is (fake_x0 - real_x0) / mean |x0 - real_x0| / elements (arXiv 2311.18828, eq. 7, 8).

    real_x0, fake_x0: what teacher and fake score predict for the renoised x0.
    """
    size = jnp.abs(x0 - real_x0).mean(axis=EXAMPLE, keepdims=True)
    target = x0 - (fake_x0 - real_x0) / jnp.maximum(size, 1e-6)
    return 0.5 * jnp.square(x0 - jax.lax.stop_gradient(target)).mean(axis=EXAMPLE)


def fake_score_loss(
    schedule: Schedule, output: Latents, x0: Latents, noise: Latents, timesteps: Timesteps
) -> Float[Array, " n"]:
    """The diffusion loss by which the fake score learns the student's distribution.

    output: its own prediction for x0 noised with ``noise`` to ``timesteps``, of the schedule's prediction type.
    """
    target = training_target(schedule, jax.lax.stop_gradient(x0), noise, timesteps)
    return jnp.square(output.astype(jnp.float32) - target).mean(axis=EXAMPLE)
