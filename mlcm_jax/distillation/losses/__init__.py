"""The losses of a step, in the order in which they are added up; config.NAME has the settings of each."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32
from ml_collections import ConfigDict

from mlcm_jax import rng
from mlcm_jax.diffusion.scheduler_config import LAST_TIMESTEP
from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.frozen_networks import FrozenNetworks, Load, read_networks
from mlcm_jax.distillation.losses.adversarial import Adversarial
from mlcm_jax.distillation.losses.adversarial_consistency import AdversarialConsistency
from mlcm_jax.distillation.losses.base import (
    CriticShapes,
    Examples,
    Loss,
    LossInputs,
    Metrics,
    critic_optimizer,
    train_critic,
)
from mlcm_jax.distillation.losses.consistency import Consistency
from mlcm_jax.distillation.losses.distribution_matching import DistributionMatching
from mlcm_jax.distillation.losses.distribution_matching_gan import DistributionMatchingGAN
from mlcm_jax.distillation.losses.preference import Preference
from mlcm_jax.distillation.losses.progressive_adversarial import ProgressiveAdversarial
from mlcm_jax.distillation.state import Critic, Frozen
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.rules import between, check_rules
from mlcm_jax.types import Latents, Params

LOSSES: dict[str, type[Loss]] = {
    loss.name: loss
    for loss in (
        Consistency,
        DistributionMatching,
        DistributionMatchingGAN,
        Adversarial,
        AdversarialConsistency,
        ProgressiveAdversarial,
        Preference,
    )
}

__all__ = [
    "LOSSES", "CriticShapes", "Examples", "Loss", "LossInputs", "active_losses", "check", "create_critics",
    "network_loads", "read_frozen_networks", "total_loss", "train_critics",
]  # fmt: skip


def check(config: ConfigDict) -> None:
    """Raise UserError for settings of losses that cannot work."""
    check_rules(config, {"losses_min_timestep": between(0, LAST_TIMESTEP)})
    for loss in LOSSES.values():
        loss.check(config)


def active_losses(context: DistillationContext) -> dict[str, Loss]:
    """The losses of a stage."""
    return {name: loss(context) for name, loss in LOSSES.items() if loss.is_active(context.config)}


def total_loss(
    losses: Mapping[str, Loss],
    context: DistillationContext,
    critics: Mapping[str, Critic],
    frozen: Frozen,
    params: Params,
    examples: Examples,
    key: Key[Array, ""],
) -> tuple[Float[Array, ""], tuple[Metrics, Latents]]:
    """The weighted sum of the losses, each of them, and the student's clean latents."""
    x0 = context.student_x0(params, frozen, examples.condition, examples.z, examples.t)
    # Losses with a minimum timestep see the answers for all states; those for the less noisy ones stay as they are.
    noisy = (examples.t >= context.config.losses_min_timestep)[:, None, None, None]
    learning = jnp.where(noisy, x0, jax.lax.stop_gradient(x0))
    total, metrics = jnp.float32(0), {}
    for name, loss in losses.items():
        answers = x0 if loss.at_every_timestep else learning
        critic = critics[name].params if loss.has_critic else {}
        value, reported = loss(critic, LossInputs(answers, examples, frozen, rng.named(key, name)))
        metrics |= {name: value} | {f"{name}_{entry}": figure for entry, figure in reported.items()}
        total += context.config[name].weight * value
    return total, (metrics, x0)


def train_critics(
    losses: Mapping[str, Loss],
    config: ConfigDict,
    critics: Mapping[str, Critic],
    frozen: Frozen,
    examples: Examples,
    x0: Latents,
    seed: UInt32[Array, "2"],
    step: Int[Array, ""],
) -> tuple[dict[str, Critic], Metrics]:
    """Each loss's critic after its updates on the student's clean latents ``x0``, and their losses."""
    trained, metrics = dict(critics), {}
    sampled = (jax.lax.stop_gradient(x0), examples)
    for name, loss in losses.items():
        if loss.has_critic:

            def critic_loss(params, sampled, key, loss=loss):
                x0, examples = sampled
                return loss.critic_loss(params, LossInputs(x0, examples, frozen, key)), ({}, ())

            key = rng.stream(seed, f"{name}_rival", step)
            trained[name], metrics[f"{name}_critic"] = train_critic(
                critic_loss, critics[name], sampled, key, config, name
            )
    return trained, metrics


def create_critics(
    context: DistillationContext, key: Key[Array, ""], student: Params, shapes: CriticShapes
) -> dict[str, Critic]:
    """The critics of a stage's losses at their start. student: trained weights that leave it the teacher."""
    critics = {}
    for name, loss in active_losses(context).items():
        if loss.has_critic:
            params = loss.init_critic(key, student, shapes)
            critics[name] = Critic(params, critic_optimizer(context.config, name).init(params))
    return critics


def read_frozen_networks(configs: Sequence[ConfigDict], architecture: Pipeline) -> FrozenNetworks:
    """The networks that the losses of a run's stages ask, each once. architecture: the teacher's pipeline in shapes.

    Weights are read here, before anything is compiled. Raises UserError as the loaders of the networks do.
    """
    loads: dict[str, Load] = {}
    for config in configs:
        loads = network_loads(config, architecture) | loads
    return read_networks(loads)


def network_loads(config: ConfigDict, architecture: Pipeline) -> dict[str, Load]:
    """What reads the frozen networks that a stage's losses ask, by role; nothing is read yet."""
    active = [loss for loss in LOSSES.values() if loss.is_active(config)]
    return {role: load for loss in active for role, load in loss.networks(config, architecture).items()}
