"""The algorithm of a step on one screen: multistep latent consistency distillation (arXiv 2406.05768)."""

from collections.abc import Callable
from functools import partial
from typing import cast

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
from mlcm_jax.distill.segments import NUM_TIMESTEPS
from mlcm_jax.distill.states import SOURCES, Rows, Source
from mlcm_jax.train import rng
from mlcm_jax.train.auxiliary import Auxiliary
from mlcm_jax.train.optim import update_ema
from mlcm_jax.train.state import TrainState, student_variables
from mlcm_jax.train.terms import Apply, Inputs, Setting, active_terms, rival_terms, train_rival
from mlcm_jax.types import Batch, Latents, Params, TextConditioning

StepFn = Callable[[TrainState, "Frozen", Batch], tuple[TrainState, dict[str, Array]]]


@flax.struct.dataclass
class Frozen:
    """What is never trained: the teacher's weights, the conditioning of its unconditional branch (one row), and the
    weights of other networks by their role (train.auxiliary)."""

    teacher: Params
    unconditional: TextConditioning
    auxiliary: dict[str, Params] = flax.struct.field(default_factory=dict)


def ends_at_edge(config: ConfigDict) -> bool:
    """Whether the teacher always goes to the segment's end, where the jump to the edge is the identity."""
    return config.target == "edge" and config.skip >= NUM_TIMESTEPS


def make_train_step(
    apply: Apply,
    schedule: Schedule,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    latent_shape: tuple[int, int, int],
    constrain: Callable[[Latents], Latents] = lambda latents: latents,
    auxiliary: Auxiliary = Auxiliary(),  # noqa: B008  (frozen)
) -> StepFn:
    """The update (state, frozen, batch) -> (state, metrics) of one stage.

    apply: (variables, latents, timesteps, conditioning) -> the denoiser's own prediction. latent_shape: height, width
    and channels of the latents. constrain: puts the sharding of the batch on latents. auxiliary: what the weights in
    ``frozen.auxiliary`` belong to.
    """
    draw_states, jump, distance = SOURCES[config.states], JUMPS[config.target], DISTANCES[config.distance]
    setting = Setting(apply, schedule, config, auxiliary)
    terms, rivals_of = active_terms(setting), rival_terms(setting)

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
        (z_m, t_m, z_n, t_n, edge, clean), pool = draw_states(source, rows, state.pool)

        if ends_at_edge(config):
            target = z_n
        else:
            target_params = state.params if config.target_network == "student" else state.ema
            target = jump(schedule, z_n, student_x0(target_params, z_n, t_n), t_n, edge)

        def seen(x0, name):
            key = rng.stream(config.seed, name, state.step)
            weights = frozen.auxiliary
            return Inputs(x0, clean, conditioning, frozen.teacher, teacher_x0, key, weights, batch.judge_tokens)

        def loss_fn(params):
            x0 = student_x0(params, z_m, t_m)
            prediction = jump(schedule, z_m, x0, t_m, edge)
            losses = {"consistency": distance(prediction, jax.lax.stop_gradient(target)).mean()}
            loss = config.consistency_weight * losses["consistency"]
            for name, term in terms.items():
                rival = state.rivals[name].params if name in rivals_of else {}
                losses[name], reported = term.loss(rival, seen(x0, name))
                losses |= {f"{name}_{key}": value for key, value in reported.items()}
                loss += config[name].weight * losses[name]
            return loss, (losses, x0)

        (loss, (losses, x0)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
        ema = None if state.ema is None else update_ema(state.ema, params, config.ema_decay)

        rivals = dict(state.rivals)
        for name, term in rivals_of.items():
            inputs = seen(jax.lax.stop_gradient(x0), f"{name}_rival")
            rivals[name], losses[f"{name}_rival"] = train_rival(term, rivals[name], inputs, config, name)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "num_segments": batch.num_segments}
        return TrainState(state.step + 1, params, opt_state, ema, pool, rivals), metrics | losses

    return train_step
