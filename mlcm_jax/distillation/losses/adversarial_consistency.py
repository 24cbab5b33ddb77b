"""A discriminator between the student's answers and their targets, where the segment ends (PCM, arXiv 2405.18407)."""

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from mlcm_jax.diffusion.parameterization import noise_further
from mlcm_jax.diffusion.scheduler_config import LAST_TIMESTEP
from mlcm_jax.distillation.losses.base import LossInputs
from mlcm_jax.distillation.losses.feature_critic import FeatureCritic, Logits, discriminator_loss, mean_of_heads
from mlcm_jax.errors import UserError
from mlcm_jax.types import Latents, Timesteps


class AdversarialConsistency(FeatureCritic):
    """Fake is the student's answer at the boundary s, real is the target there. Both are noised on to the same s' in
    [s, s + 1000 / M), with the same noise (arXiv 2405.18407)."""

    name: ClassVar[str] = "adversarial_consistency"
    reads_target: ClassVar[bool] = True
    kernel_size: ClassVar[int] = 1

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        super().check(config)
        if cls.is_active(config) and config.target == "x0":
            raise UserError(
                "config.adversarial_consistency compares noisy latents where a segment ends, and target='x0' compares "
                "clean ones: use target='boundary', or config.adversarial."
            )

    def __call__(self, critic, inputs):
        return hinge_generator_loss(self._noised_on(critic, inputs, self.answer(inputs))), {}

    def critic_loss(self, critic, inputs):
        answers = inputs.examples.target, self.answer(inputs)
        real, fake = (self._noised_on(critic, inputs, latents) for latents in answers)
        return discriminator_loss(real, fake)

    def _noised_on(self, critic, inputs: LossInputs, latents: Latents) -> list[Array]:
        examples = inputs.examples
        time_key, noise_key = jax.random.split(inputs.key)
        t = draw_later(time_key, examples.boundary, examples.width)
        noise = jax.random.normal(noise_key, latents.shape)
        z = noise_further(self.context.schedule, latents, noise, examples.boundary, t)
        return self.logits(critic, inputs, z, t)


def draw_later(key: Key[Array, ""], boundary: Timesteps, width: Timesteps) -> Timesteps:
    """s' of each example, uniform over boundary <= s' < boundary + width, and at most 999."""
    return jax.random.randint(key, boundary.shape, boundary, jnp.minimum(boundary + width, LAST_TIMESTEP + 1))


def hinge_generator_loss(fake: Sequence[Logits]) -> Float[Array, ""]:
    """Mean over the heads of relu(1 - fake), as PCM's code has it."""
    return mean_of_heads(jax.nn.relu(1 - f).mean() for f in fake)
