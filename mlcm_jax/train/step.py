"""The algorithm of a step on one screen: multistep latent consistency distillation (arXiv 2406.05768)."""

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
from mlcm_jax.distill.consistency import JUMPS
from mlcm_jax.distill.losses import DISTANCES
from mlcm_jax.distill.states import SOURCES, Rows, Source
from mlcm_jax.models import lora
from mlcm_jax.train import rng
from mlcm_jax.train.optim import update_ema
from mlcm_jax.train.state import TrainState
from mlcm_jax.types import Batch, Latents, Params, TextConditioning

# (variables, latents, timesteps, conditioning) -> the network's own prediction
Apply = Callable[..., Any]
StepFn = Callable[[TrainState, "Frozen", Batch], tuple[TrainState, dict[str, Array]]]


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
    """The update (state, frozen, batch) -> (state, metrics) of one stage.

    latent_shape: height, width and channels of the latents. constrain: puts the sharding of the batch on latents.
    """
    draw_states, jump, distance = SOURCES[config.states], JUMPS[config.target], DISTANCES[config.distance]

    def train_step(state: TrainState, frozen: Frozen, batch: Batch):
        n, conditioning = batch.jumps.shape[0], batch.conditioning
        unconditional = jax.tree.map(lambda a: jnp.broadcast_to(a, (n, *a.shape[1:])), frozen.unconditional)
        noise = jax.random.normal(rng.stream(config.seed, "noise", state.step), (n, *latent_shape))

        def teacher_x0(z, t):
            predict = partial(apply, {"params": frozen.teacher})
            output = guided_predict(predict, z, t, conditioning, unconditional, batch.guidance_scale)
            return predict_x0_eps(schedule, output, z, t).x0

        def student_x0(params, z, t):
            output = apply(student_variables(params, frozen.teacher, config), z, t, conditioning)
            return predict_x0_eps(schedule, output, z, t).x0

        key = rng.stream(config.seed, "timesteps", state.step)
        source = Source(schedule, config, teacher_x0, partial(student_x0, state.params), key)
        rows = Rows(batch.jumps, batch.num_segments, constrain(noise), batch.latents)
        (z_m, t_m, z_n, t_n, edge), pool = draw_states(source, rows, state.pool)

        target_params = state.params if config.target_network == "student" else state.ema
        target = jump(partial(student_x0, target_params), schedule, z_n, t_n, edge)

        def loss_fn(params):
            prediction = jump(partial(student_x0, params), schedule, z_m, t_m, edge)
            return distance(prediction, jax.lax.stop_gradient(target)).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
        ema = None if state.ema is None else update_ema(state.ema, params, config.ema_decay)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "num_segments": batch.num_segments}
        return TrainState(state.step + 1, params, opt_state, ema, pool), metrics

    return train_step
