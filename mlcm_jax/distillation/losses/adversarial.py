"""A discriminator on the frozen teacher's features of noised latents (arXiv 2311.17042; in latent space 2403.12015)."""

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mlcm_jax.distillation.losses.base import LossInputs, renoise
from mlcm_jax.distillation.losses.feature_critic import (
    FeatureCritic,
    Logits,
    discriminator_loss,
    mean_of_heads,
    require_clean_latents,
)
from mlcm_jax.rules import check_rules, one_of
from mlcm_jax.types import Latents


class Adversarial(FeatureCritic):
    """The student's clean latents against those that the states were made of, both noised to the same timesteps."""

    name: ClassVar[str] = "adversarial"

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        super().check(config)
        check_rules(config, {"adversarial.features": one_of("encoder", "decoder")})
        if cls.is_active(config):
            require_clean_latents(config, cls.name)

    @property
    def part(self) -> str:
        return self.context.config.adversarial.features

    def __call__(self, critic, inputs):
        return generator_loss(self._renoised(critic, inputs, inputs.x0)), {}

    def critic_loss(self, critic, inputs):
        real, fake = (self._renoised(critic, inputs, latents) for latents in (inputs.examples.clean, inputs.x0))
        return discriminator_loss(real, fake)

    def _renoised(self, critic, inputs: LossInputs, latents: Latents | None) -> list[Array]:
        assert latents is not None  # ``check`` has seen to it
        z, _, t = renoise(self.context.schedule, inputs.key, latents)
        return self.logits(critic, inputs, z, t)


def generator_loss(fake: Sequence[Logits]) -> Float[Array, ""]:
    """Mean over the heads of -fake."""
    return mean_of_heads(-f.mean() for f in fake)
