"""What adversarial losses share: heads on the frozen teacher's features of noisy latents, and the hinge loss."""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mlcm_jax.distillation.losses.base import Loss, LossInputs
from mlcm_jax.distillation.states import STATE_SOURCES
from mlcm_jax.errors import UserError
from mlcm_jax.models.discriminator import DiscriminatorHeads, block_features, is_block
from mlcm_jax.rules import EVEN, POSITIVE, check_rules
from mlcm_jax.types import Latents, Timesteps

# logits of one head: any shape with the batch first
Logits = Float[Array, "n *rest"]


class FeatureCritic(Loss):
    """The critic is a set of heads on the outputs of blocks of the frozen teacher, which is asked at the latents' own
    noise level, and with the examples' conditioning. kernel_size: of a head's first convolution."""

    has_critic: ClassVar[bool] = True
    kernel_size: ClassVar[int] = 3

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        super().check(config)
        rules = {"learning_rate": POSITIVE, "updates": POSITIVE, "width": EVEN}
        check_rules(config, {f"{cls.name}.{key}": rule for key, rule in rules.items()})

    def init_critic(self, key, student, shapes):
        t = jax.ShapeDtypeStruct(shapes.latents.shape[:1], jnp.int32)
        features = jax.eval_shape(self._features, shapes.teacher, shapes.latents, t, shapes.conditioning)
        zeros = jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), features)
        return self._heads.init(key, zeros)["params"]

    def logits(self, critic, inputs: LossInputs, z: Latents, t: Timesteps) -> list[Array]:
        """Of each head, for noisy latents z at t."""
        features = self._features(inputs.frozen.teacher, z, t, inputs.examples.condition.conditioning)
        return cast(list[Array], self._heads.apply({"params": critic}, features))

    @property
    def part(self) -> str:
        """Of the teacher's UNet, whose blocks are taken: the encoder, with the middle block, or the decoder."""
        return "encoder"

    @property
    def _heads(self) -> DiscriminatorHeads:
        return DiscriminatorHeads(self.context.config[self.name].width, self.kernel_size)

    def _features(self, teacher, z, t, conditioning):
        """Outputs of the blocks; the work behind the last of them is never run."""
        variables, wanted = {"params": teacher}, partial(is_block, part=self.part)
        _, captured = self.context.apply(
            variables, z, t, conditioning, capture_intermediates=wanted, mutable=["intermediates"]
        )
        return block_features(captured["intermediates"], self.part)


def require_clean_latents(config: ConfigDict, name: str) -> None:
    """Raise UserError where the states have no clean latents, which the loss ``name`` takes for real."""
    if not STATE_SOURCES[config.states].gives_clean:
        fit = " or ".join(name for name, source in STATE_SOURCES.items() if source.gives_clean)
        raise UserError(
            f"config.{name} needs clean latents to compare with, and states={config.states!r} has none: use {fit}."
        )


def discriminator_loss(real: Sequence[Logits], fake: Sequence[Logits]) -> Float[Array, ""]:
    """Hinge loss (arXiv 1705.02894): the mean over the heads of relu(1 - real) + relu(1 + fake)."""
    pairs = zip(real, fake, strict=True)
    return mean_of_heads(jax.nn.relu(1 - r).mean() + jax.nn.relu(1 + f).mean() for r, f in pairs)


def mean_of_heads(values) -> Float[Array, ""]:
    """The mean of one number for each head."""
    return jnp.stack(list(values)).mean()
