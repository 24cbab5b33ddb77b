"""The algorithm of a step on one screen: multistep latent consistency distillation (arXiv 2406.05768, stage 1)."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from ml_collections import ConfigDict

from mlcm_jax.diffusion.guidance import guided_predict
from mlcm_jax.diffusion.parameterization import predict_x0_eps
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.distill import segments
from mlcm_jax.distill.consistency import jump_to_edge
from mlcm_jax.distill.losses import DISTANCES
from mlcm_jax.distill.trajectory import denoising_timesteps, multistep_denoising
from mlcm_jax.models import lora
from mlcm_jax.train import rng
from mlcm_jax.train.optim import update_ema
from mlcm_jax.train.state import TrainState
from mlcm_jax.types import Latents, Params, TextConditioning, Timesteps

# (variables, latents, timesteps, conditioning) -> the network's own prediction
Apply = Callable[..., Any]
StepFn = Callable[[TrainState, "Frozen", TextConditioning], tuple[TrainState, dict[str, Array]]]


@flax.struct.dataclass
class Frozen:
    """What is never trained: the teacher's weights, and the conditioning of its unconditional branch (one row)."""

    teacher: Params
    unconditional: TextConditioning


def student_variables(params: Params, teacher: Params, config: ConfigDict) -> Params:
    """The student's variables: its own weights, or the teacher's with the trained low-rank factors beside them."""
    if config.trainable == "full":
        return {"params": params}
    return {"params": teacher, "lora": lora.scaled(params, config.lora.alpha, config.lora.rank)}


def make_train_step(
    apply: Apply,
    schedule: Schedule,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    latent_shape: tuple[int, int, int],
    constrain: Callable[[Latents], Latents] = lambda latents: latents,
) -> StepFn:
    """The update (state, frozen, conditioning [n ...]) -> (state, metrics).

    latent_shape: height, width and channels of the latents. constrain: puts the sharding of the batch on latents.
    """
    distance = DISTANCES[config.distance]

    def train_step(state: TrainState, frozen: Frozen, conditioning: TextConditioning):
        n = conditioning.pooled.shape[0]
        segment, t_m, t_n, edge = draw_timesteps(state.step, n, config)
        unconditional = jax.tree.map(lambda a: jnp.broadcast_to(a, (n, *a.shape[1:])), frozen.unconditional)
        noise = jax.random.normal(rng.stream(config.seed, "noise", state.step), (n, *latent_shape))

        def teacher_x0(z, t):
            predict = partial(apply, {"params": frozen.teacher})
            output = guided_predict(predict, z, t, conditioning, unconditional, config.guidance_scale)
            return predict_x0_eps(schedule, output, z, t).x0

        def student_x0(params, z, t):
            output = apply(student_variables(params, frozen.teacher, config), z, t, conditioning)
            return predict_x0_eps(schedule, output, z, t).x0

        num_jumps = segment + 1
        times = denoising_timesteps(t_m, t_n, num_jumps, config.num_segments)
        z_m, z_n = multistep_denoising(teacher_x0, schedule, constrain(noise), times, num_jumps)
        target = jump_to_edge(partial(student_x0, state.params), schedule, z_n, t_n, edge)

        def loss_fn(params):
            jump = jump_to_edge(partial(student_x0, params), schedule, z_m, t_m, edge)
            return distance(jump, jax.lax.stop_gradient(target)).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
        ema = None if state.ema is None else update_ema(state.ema, params, config.ema_decay)
        metrics = {"loss": loss, "grad_norm": optax.global_norm(grads), "segment": segment}
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    return train_step


def draw_timesteps(step: Array, n: int, config: ConfigDict) -> tuple[Array, Timesteps, Timesteps, Timesteps]:
    """The step's segment, and for each example a time in it (t_m), ``skip`` later (t_n), and the segment's end.

    Every M consecutive steps visit each segment once, in random order: the whole batch is in one segment, so that no
    example waits for the longer trajectories of others.
    """
    block, place = step // config.num_segments, step % config.num_segments
    segment = jax.random.permutation(rng.stream(config.seed, "segment", block), config.num_segments)[place]
    each = jnp.full((n,), segment)
    t_m = segments.draw_timesteps(rng.stream(config.seed, "timesteps", step), each, config.num_segments)
    _, edge = segments.segment_edges(each, config.num_segments)
    return segment, t_m, segments.short_step(t_m, config.skip, edge), edge
