"""Distribution matching with a discriminator on the fake score's bottleneck (DMD2, arXiv 2405.14867, sec. 4.3)."""

from functools import partial
from typing import ClassVar, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mlcm_jax.diffusion.parameterization import add_noise
from mlcm_jax.distillation.losses.base import LossInputs, renoise
from mlcm_jax.distillation.losses.distribution_matching import DistributionMatching, fake_score_loss
from mlcm_jax.distillation.losses.feature_critic import Logits, require_clean_latents
from mlcm_jax.distillation.state import student_variables
from mlcm_jax.models.discriminator import DiscriminatorHeads, block_features, is_block
from mlcm_jax.rules import EVEN, NOT_NEGATIVE, check_rules
from mlcm_jax.types import Condition, Latents, Params, Timesteps


class DistributionMatchingGAN(DistributionMatching):
    """The critic is the fake score with a head on its middle block that tells real latents from the student's."""

    name: ClassVar[str] = "distribution_matching_gan"

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        super().check(config)
        weights = (f"{cls.name}.{key}" for key in ("adversarial_weight", "critic_adversarial_weight"))
        check_rules(config, dict.fromkeys(weights, NOT_NEGATIVE) | {f"{cls.name}.width": EVEN})
        if cls.is_active(config):
            require_clean_latents(config, cls.name)

    def __call__(self, critic, inputs):
        matching, _ = super().__call__(critic["score"], inputs)
        z, _, t = renoise(self.context.schedule, jax.random.fold_in(inputs.key, 1), inputs.x0)
        _, logits = self._output_and_logits(critic, inputs, z, t)
        fooling = jax.nn.softplus(-logits).mean()
        return matching + self._settings.adversarial_weight * fooling, {"matching": matching, "adversarial": fooling}

    def init_critic(self, key, student, shapes):
        t = jax.ShapeDtypeStruct(shapes.latents.shape[:1], jnp.int32)
        condition = Condition(shapes.conditioning, cast(Array, jax.ShapeDtypeStruct(t.shape, jnp.float32)))

        def features(score, teacher, z, t, condition):
            return self._output_and_features(score, teacher, z, t, condition)[1]

        found = jax.eval_shape(features, student, shapes.teacher, shapes.latents, t, condition)
        zeros = jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), found)
        return {"score": super().init_critic(key, student, shapes), "head": self._head.init(key, zeros)["params"]}

    def critic_loss(self, critic, inputs):
        """The diffusion loss of the student's latents, and the logistic loss of the head."""
        schedule, clean = self.context.schedule, inputs.examples.clean
        assert clean is not None  # ``check`` has seen to it
        z, noise, t = renoise(schedule, inputs.key, inputs.x0)
        output, fake = self._output_and_logits(critic, inputs, z, t)
        _, real = self._output_and_logits(critic, inputs, add_noise(schedule, clean, noise, t), t)
        diffusion = fake_score_loss(schedule, output, inputs.x0, noise, t).mean()
        return diffusion + self._settings.critic_adversarial_weight * logistic_loss(real, fake)

    @property
    def _settings(self) -> ConfigDict:
        return self.context.config[self.name]

    @property
    def _head(self) -> DiscriminatorHeads:
        return DiscriminatorHeads(self._settings.width)

    def _output_and_features(self, score: Params, teacher: Params, z: Latents, t: Timesteps, condition: Condition):
        variables = student_variables(score, teacher, self.context.config)
        options = {"capture_intermediates": partial(is_block, part="middle"), "mutable": ["intermediates"]}
        output, captured = self.context.student_output(variables, z, t, condition, **options)
        return output, block_features(captured["intermediates"], "middle")

    def _output_and_logits(
        self, critic: Params, inputs: LossInputs, z: Latents, t: Timesteps
    ) -> tuple[Latents, Logits]:
        condition, teacher = inputs.examples.condition, inputs.frozen.teacher
        output, features = self._output_and_features(critic["score"], teacher, z, t, condition)
        (logits,) = cast(list[Array], self._head.apply({"params": critic["head"]}, features))
        return output, logits


def logistic_loss(real: Logits, fake: Logits) -> Float[Array, ""]:
    """softplus(-real) + softplus(fake), each averaged: the discriminator's side of the non-saturating GAN loss (arXiv
    1406.2661)."""
    return jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()
