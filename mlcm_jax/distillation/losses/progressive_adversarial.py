"""The adversarial loss of progressive distillation (SDXL-Lightning, arXiv 2402.13929, sec. 3.2 and 3.3).

A discriminator tells the student's state at the end of the segment from the teacher's, given the state that both began
at, or, relaxed, by the end state alone.
"""

from functools import partial
from typing import ClassVar, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mlcm_jax.distillation.losses.base import Loss, LossInputs
from mlcm_jax.distillation.losses.distribution_matching_gan import logistic_loss
from mlcm_jax.distillation.targets import BOUNDARY
from mlcm_jax.errors import UserError
from mlcm_jax.models.discriminator import PairHead, block_features, is_block
from mlcm_jax.rules import EVEN, POSITIVE, check_rules
from mlcm_jax.types import Latents, Params, Timesteps

DECODER = ("up_blocks", "conv_norm_out", "conv_out")  # what a discriminator has not of a UNet


class ProgressiveAdversarial(Loss):
    """The critic is a trainable copy of the teacher's encoder and middle block, kept as its difference from the frozen
    teacher, which is 0 at first, and a head on the middle block's outputs for both states."""

    name: ClassVar[str] = "progressive_adversarial"
    reads_target: ClassVar[bool] = True
    has_critic: ClassVar[bool] = True
    stage_settings: ClassVar[tuple[str, ...]] = ("weight", "relaxed")

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        super().check(config)
        rates = {f"{cls.name}.learning_rate": POSITIVE, f"{cls.name}.updates": POSITIVE, f"{cls.name}.width": EVEN}
        check_rules(config, rates)
        if cls.is_active(config) and not (config.target == "boundary" and BOUNDARY.is_teachers_state(config)):
            raise UserError(
                f"config.{cls.name} compares with the teacher's state at the end of the segment: set target='boundary' "
                "and skip=1000."
            )

    def __call__(self, critic, inputs):
        """softplus(-logits) of the student's state: the non-saturating loss."""
        return jax.nn.softplus(-self._logits(critic, inputs, self.answer(inputs))).mean(), {}

    def init_critic(self, key, student, shapes):
        t = jax.ShapeDtypeStruct(shapes.latents.shape[:1], jnp.int32)
        feature = jax.eval_shape(self._feature, shapes.teacher, shapes.latents, t, shapes.conditioning)
        zeros = jnp.zeros((1, *feature.shape[1:]), feature.dtype)
        difference = {name: part for name, part in shapes.teacher.items() if not name.startswith(DECODER)}
        return {
            "encoder": jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), difference),
            "head": self._head.init(key, zeros, zeros)["params"],
        }

    def critic_loss(self, critic, inputs):
        fake = jax.lax.stop_gradient(self.answer(inputs))
        return logistic_loss(*(self._logits(critic, inputs, end) for end in (inputs.examples.target, fake)))

    @property
    def _head(self) -> PairHead:
        return PairHead(self.context.config[self.name].width)

    def _feature(self, unet: Params, z: Latents, t: Timesteps, conditioning) -> Float[Array, "n h2 w2 k"]:
        """The middle block's output; the decoder's work is never run."""
        options = {"capture_intermediates": partial(is_block, part="middle"), "mutable": ["intermediates"]}
        _, captured = self.context.apply({"params": unet}, z, t, conditioning, **options)
        return block_features(captured["intermediates"], "middle")["mid_block"]

    def _logits(self, critic: Params, inputs: LossInputs, end: Latents) -> Float[Array, "n 1"]:
        """D(x_t, x_{t-ns}, c), where ``end`` is x_{t-ns}. Relaxed, the head sees zeros for the feature of x_t."""
        examples, teacher = inputs.examples, inputs.frozen.teacher
        moved = jax.tree.map(
            lambda a, difference: a.astype(jnp.float32) + difference,
            {name: teacher[name] for name in critic["encoder"]},
            critic["encoder"],
        )
        unet, conditioning = teacher | moved, examples.condition.conditioning
        there = self._feature(unet, end, examples.boundary, conditioning)
        if self.context.config[self.name].relaxed:
            begin = jnp.zeros_like(there)
        else:
            begin = self._feature(unet, examples.z, examples.t, conditioning)
        return cast(Array, self._head.apply({"params": critic["head"]}, begin, there))
