"""The algorithm of a step on one screen: multistep latent consistency distillation (arXiv 2406.05768)."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mlcm_jax import rng
from mlcm_jax.distillation import segments
from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.losses import Examples, active_losses, total_loss, train_critics
from mlcm_jax.distillation.microbatches import value_and_grad
from mlcm_jax.distillation.state import Frozen, TrainState, update_ema
from mlcm_jax.distillation.states import STATE_SOURCES, Draws, SourceContext, States
from mlcm_jax.distillation.targets import TARGETS
from mlcm_jax.parallel.sharding import split_batch
from mlcm_jax.types import Batch, Latents, Params

TrainStep = Callable[[TrainState, Frozen, Batch], tuple[TrainState, dict[str, Array]]]


def make_train_step(
    context: DistillationContext,
    optimizer: optax.GradientTransformation,
    latent_shape: tuple[int, int, int],
    bucket: int | None = None,
) -> TrainStep:
    """The update (state, frozen, batch) -> (state, metrics) of one stage. latent_shape: height, width and channels.

    bucket: which of the state's trajectory buffers is used, where there is one for each size of images; None: the one.
    """
    config, losses = context.config, active_losses(context)
    target_end = TARGETS[config.target].draw_end

    def train_step(state: TrainState, frozen: Frozen, batch: Batch):
        if config.teacher_network == "previous":
            state = dataclasses.replace(state, previous_student=_renewed(state, batch))
        batch = with_empty_prompts(batch, frozen)
        states, trajectory_buffer = draw_states(context, state, frozen, batch, latent_shape, bucket)
        end_key = rng.stream(batch.seed, "ends", state.step)
        states = states._replace(boundary=target_end(end_key, states.t_n, states.boundary))
        target = states.z_n
        if any(loss.reads_target for loss in losses.values()):
            target = jax.lax.stop_gradient(target_answer(context, state, frozen, batch, states))
        examples = Examples(
            z=states.z_m,
            t=states.t_m,
            boundary=states.boundary,
            width=segments.width(states.t_m, batch.num_segments),
            target=target,
            clean=states.clean,
            condition=batch.condition,
            prompt_tokens=batch.prompt_tokens,
        )
        loss_fn = partial(total_loss, losses, context, state.critics, frozen)
        key = rng.stream(batch.seed, "terms", state.step)
        (loss, (metrics, x0)), grads = value_and_grad(loss_fn, state.params, examples, key, config.microbatches)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
        ema = None if state.ema is None else update_ema(state.ema, params, config.ema_decay)
        critics, critic_metrics = train_critics(
            losses, config, state.critics, frozen, examples, x0, batch.seed, state.step
        )
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        metrics = {"loss": loss, **norms, "num_segments": batch.num_segments} | metrics | critic_metrics
        previous = state.previous_student
        return TrainState(state.step + 1, params, opt_state, ema, trajectory_buffer, critics, previous), metrics

    return train_step


def _renewed(state: TrainState, batch: Batch) -> Params:
    """The student that is the teacher from this step on: the one before, or the present one."""
    previous, renews = cast(Params, state.previous_student), cast(Array, batch.renews_teacher)
    return jax.tree.map(partial(jnp.where, renews), state.trained, previous)


def with_empty_prompts(batch: Batch, frozen: Frozen) -> Batch:
    """The batch whose examples without a prompt are conditioned as the teacher's unconditional branch is."""
    if batch.without_prompt is None:
        return batch
    empty, own = batch.without_prompt, batch.conditioning
    hidden_states = jnp.where(empty[:, None, None], frozen.unconditional.hidden_states, own.hidden_states)
    pooled = jnp.where(empty[:, None], frozen.unconditional.pooled, own.pooled)
    conditioning = dataclasses.replace(own, hidden_states=hidden_states, pooled=pooled)
    return dataclasses.replace(batch, conditioning=conditioning)


def draw_states(
    context: DistillationContext,
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    latent_shape: tuple[int, int, int],
    bucket: int | None,
) -> tuple[States, Any]:
    """A state of each example, the teacher's short step on from it, and what the state keeps of live trajectories."""
    condition, streams = batch.condition, ("noise", "timesteps", "student_samples")
    noise_key, timestep_key, sample_key = (rng.stream(batch.seed, name, state.step) for name in streams)
    teacher_x0 = partial(context.teacher_x0, frozen, condition)
    if context.config.teacher_network == "previous":
        teacher_x0 = partial(context.former_student_x0, cast(Params, state.previous_student), frozen, condition)
    source = SourceContext(
        context.schedule,
        context.config,
        teacher_x0,
        partial(context.student_x0, state.params, frozen, condition),
        timestep_key,
        sample_key,
        state.step,
    )
    noise = jax.random.normal(noise_key, (*batch.trajectory_step.shape, *latent_shape))
    draws = Draws(batch.trajectory_step, batch.num_segments, split_batch(noise), batch.latents)
    if bucket is None or state.trajectory_buffer is None:
        return STATE_SOURCES[context.config.states].states(source, draws, cast(Any, state.trajectory_buffer))
    kept: list[Any] = list(cast(Any, state.trajectory_buffer))
    states, kept[bucket] = STATE_SOURCES[context.config.states].states(source, draws, kept[bucket])
    return states, tuple(kept)


def target_answer(
    context: DistillationContext, state: TrainState, frozen: Frozen, batch: Batch, states: States
) -> Latents:
    """What the student's answer for z_m is compared with: the answer for z_n, by the student or its moving average."""
    target = TARGETS[context.config.target]
    if target.is_teachers_state(context.config):
        return states.z_n
    params = state.ema if context.config.target_network == "ema" else state.params
    x0 = context.student_x0(cast(Params, params), frozen, batch.condition, states.z_n, states.t_n)
    return target.consistency_function(context.schedule, states.z_n, x0, states.t_n, states.boundary)
