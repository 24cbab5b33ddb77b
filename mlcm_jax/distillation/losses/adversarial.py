"""A discriminator on the frozen teacher's features of noised latents (arXiv 2311.17042; in latent space 2403.12015)."""

from collections.abc import Sequence
from typing import ClassVar, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mlcm_jax.distillation.losses.base import Loss, LossInputs, renoise
from mlcm_jax.distillation.states import STATE_SOURCES
from mlcm_jax.errors import UserError
from mlcm_jax.models.discriminator import DiscriminatorHeads, block_features, is_encoder_block
from mlcm_jax.rules import POSITIVE, Rule, check_rules
from mlcm_jax.types import Latents

# logits of one head: any shape with the batch first
Logits = Float[Array, "n *rest"]


class Adversarial(Loss):
    """The critic is a set of heads on the outputs of the teacher's encoder and middle blocks."""

    name: ClassVar[str] = "adversarial"
    has_critic: ClassVar[bool] = True

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        super().check(config)
        even = Rule(lambda v: v >= 2 and v % 2 == 0, "an even number above 0")
        rules = {"adversarial.learning_rate": POSITIVE, "adversarial.updates": POSITIVE, "adversarial.width": even}
        check_rules(config, rules)
        if cls.is_active(config) and not STATE_SOURCES[config.states].gives_clean:
            fit = " or ".join(name for name, source in STATE_SOURCES.items() if source.gives_clean)
            raise UserError(
                f"config.adversarial needs clean latents to compare with, and states={config.states!r} has none: use "
                f"{fit}."
            )

    def __call__(self, critic, inputs):
        return generator_loss(self._logits(critic, inputs, inputs.x0)), {}

    def init_critic(self, key, student, shapes):
        t = jax.ShapeDtypeStruct(shapes.latents.shape[:1], jnp.int32)
        features = jax.eval_shape(self._features, shapes.teacher, shapes.latents, t, shapes.conditioning)
        zeros = jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), features)
        return self._heads.init(key, zeros)["params"]

    def critic_loss(self, critic, inputs):
        real, fake = (self._logits(critic, inputs, latents) for latents in (inputs.examples.clean, inputs.x0))
        return discriminator_loss(real, fake)

    @property
    def _heads(self) -> DiscriminatorHeads:
        return DiscriminatorHeads(self.context.config.adversarial.width)

    def _features(self, teacher, z, t, conditioning):
        """Outputs of the encoder's and the middle blocks; the decoder's work is never run."""
        variables = {"params": teacher}
        _, captured = self.context.apply(
            variables, z, t, conditioning, capture_intermediates=is_encoder_block, mutable=["intermediates"]
        )
        return block_features(captured["intermediates"])

    def _logits(self, critic, inputs: LossInputs, latents: Latents | None) -> list[Array]:
        assert latents is not None  # ``check`` has seen to it
        z, _, t = renoise(self.context.schedule, inputs.key, latents)
        features = self._features(inputs.frozen.teacher, z, t, inputs.examples.condition.conditioning)
        return cast(list[Array], self._heads.apply({"params": critic}, features))


def discriminator_loss(real: Sequence[Logits], fake: Sequence[Logits]) -> Float[Array, ""]:
    """Hinge loss (arXiv 1705.02894): the mean over the heads of relu(1 - real) + relu(1 + fake)."""
    pairs = zip(real, fake, strict=True)
    return _mean(jax.nn.relu(1 - r).mean() + jax.nn.relu(1 + f).mean() for r, f in pairs)


def generator_loss(fake: Sequence[Logits]) -> Float[Array, ""]:
    """Mean over the heads of -fake."""
    return _mean(-f.mean() for f in fake)


def _mean(values) -> Float[Array, ""]:
    return jnp.stack(list(values)).mean()
