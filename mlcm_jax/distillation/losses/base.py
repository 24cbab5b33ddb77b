"""What a loss is, with its critic where it has one: a network that is trained beside the student."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from mlcm_jax.diffusion.parameterization import add_noise
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.frozen_networks import Load
from mlcm_jax.distillation.microbatches import LossFn, value_and_grad
from mlcm_jax.distillation.state import Critic, Frozen
from mlcm_jax.distillation.targets import TARGETS
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.rules import NOT_NEGATIVE, check_rules
from mlcm_jax.types import Condition, Latents, Params, TextConditioning, Timesteps

LOWEST, HIGHEST = 20, 980  # timesteps of ``renoise``: 2 to 98 % of them (arXiv 2311.18828)

Metrics = dict[str, Float[Array, ""]]  # without gradient


class Examples(NamedTuple):
    """What losses are made of, an entry an example: a state z at t, the boundary where its answer is compared, the
    width of its segment in timesteps, the target, clean latents of the state where its source has them, and the
    prompts as frozen networks read them, by role."""

    z: Latents
    t: Timesteps
    boundary: Timesteps
    width: Timesteps
    target: Latents
    clean: Latents | None
    condition: Condition
    prompt_tokens: dict[str, Array]


class LossInputs(NamedTuple):
    """What a loss sees of a step. x0: the student's clean latents for the states of the examples."""

    x0: Latents
    examples: Examples
    frozen: Frozen
    key: Key[Array, ""]


class CriticShapes(NamedTuple):
    """ShapeDtypeStructs of the teacher's weights and of a batch, from which a critic is made."""

    teacher: Params
    conditioning: TextConditioning
    latents: jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss on the student, with the name of its settings: config.NAME.weight, and what else it needs.

    has_critic: whether ``init_critic`` and ``critic_loss`` are there; the critic is then trained in the same step, with
    config.NAME.learning_rate and config.NAME.updates. reads_target: whether it reads the target, for which a network
    may have to be called. at_every_timestep: whether it ignores losses_min_timestep.
    stage_settings: keys below config.NAME that may change from stage to stage.
    """

    context: DistillationContext
    name: ClassVar[str]
    has_critic: ClassVar[bool] = False
    reads_target: ClassVar[bool] = False
    at_every_timestep: ClassVar[bool] = False
    stage_settings: ClassVar[tuple[str, ...]] = ("weight",)

    @classmethod
    def is_active(cls, config: ConfigDict) -> bool:
        """Whether a stage with this configuration has the loss."""
        return config[cls.name].weight > 0

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        """Raise UserError for settings that cannot work."""
        check_rules(config, {f"{cls.name}.weight": NOT_NEGATIVE})

    @classmethod
    def networks(cls, config: ConfigDict, architecture: Pipeline) -> Mapping[str, Load]:
        """The frozen networks that an active loss asks, by role. architecture: the teacher's pipeline in shapes."""
        return {}

    def __call__(self, critic: Params, inputs: LossInputs) -> tuple[Float[Array, ""], Metrics]:
        """What the student minimises, before the weight, and what is reported beside it. critic: {} where none is."""
        raise NotImplementedError

    def answer(self, inputs: LossInputs) -> Latents:
        """The student's answer, where it is compared with the target."""
        examples, target = inputs.examples, TARGETS[self.context.config.target]
        return target.consistency_function(self.context.schedule, examples.z, inputs.x0, examples.t, examples.boundary)

    def init_critic(self, key: Key[Array, ""], student: Params, shapes: CriticShapes) -> Params:
        """The critic's weights at the start, float32. student: trained weights that leave the student the teacher."""
        raise NotImplementedError

    def critic_loss(self, critic: Params, inputs: LossInputs) -> Float[Array, ""]:
        """What the critic minimises; x0 has no gradient."""
        raise NotImplementedError


def renoise(schedule: Schedule, key: Key[Array, ""], latents: Latents) -> tuple[Latents, Latents, Timesteps]:
    """Latents noised to random timesteps, the noise and the timesteps: the same for every call with a key."""
    time_key, noise_key = jax.random.split(key)
    t = jax.random.randint(time_key, (len(latents),), LOWEST, HIGHEST + 1)
    noise = jax.random.normal(noise_key, latents.shape)
    return add_noise(schedule, latents, noise, t), noise, t


def critic_optimizer(config: ConfigDict, name: str) -> optax.GradientTransformation:
    """Adam without momentum, as is usual for critics, after clipping by global norm."""
    rate, eps = config[name].learning_rate, config.optim.eps
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b1=0.0, b2=0.99, eps=eps))


def train_critic(
    loss_fn: LossFn, critic: Critic, examples: object, key: Key[Array, ""], config: ConfigDict, name: str
) -> tuple[Critic, Array]:
    """``updates`` updates of a critic on the student's latents, each with other noise; returns its last loss."""
    optimizer = critic_optimizer(config, name)

    def update(critic, i):
        again = jax.random.fold_in(key, i)
        (loss, _), grads = value_and_grad(loss_fn, critic.params, examples, again, config.microbatches)
        updates, opt_state = optimizer.update(grads, critic.opt_state, critic.params)
        return Critic(cast(Params, optax.apply_updates(critic.params, updates)), opt_state), loss

    def all_updates(unroll: bool):
        return lambda critic: jax.lax.scan(update, critic, jnp.arange(config[name].updates), unroll=unroll)

    # XLA's CPU compiler has fast gradients of convolutions outside loops only (jax issue 12868).
    critic, losses = jax.lax.platform_dependent(critic, cpu=all_updates(unroll=True), default=all_updates(unroll=False))
    return critic, losses[-1]
