"""The algorithm of a step on one screen: multistep latent consistency distillation (arXiv 2406.05768)."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from ml_collections import ConfigDict

from mlcm_jax import rng
from mlcm_jax.diffusion.guidance import guided_predict
from mlcm_jax.diffusion.parameterization import predict_x0_eps
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.distillation.distances import DISTANCES
from mlcm_jax.distillation.frozen_networks import Auxiliary
from mlcm_jax.distillation.losses.base import Apply, Inputs, Setting, Told, active_terms, rival_terms, train_rival
from mlcm_jax.distillation.microbatches import value_and_grad
from mlcm_jax.distillation.segments import NUM_TIMESTEPS
from mlcm_jax.distillation.state import TrainState, student_variables
from mlcm_jax.distillation.states import SOURCES, Rows, Source
from mlcm_jax.distillation.targets import JUMPS
from mlcm_jax.parallel.sharding import split_batch
from mlcm_jax.training.optimizer import update_ema
from mlcm_jax.types import Batch, Latents, Params, TextConditioning, Timesteps

StepFn = Callable[[TrainState, "Frozen", Batch], tuple[TrainState, dict[str, Array]]]


@flax.struct.dataclass
class Frozen:
    """What is never trained: the teacher's weights, the conditioning of its unconditional branch (one row), and the
    weights of other networks by their role (distillation.frozen_networks)."""

    teacher: Params
    unconditional: TextConditioning
    auxiliary: dict[str, Params] = flax.struct.field(default_factory=dict)


def ends_at_edge(config: ConfigDict) -> bool:
    """Whether the teacher always goes to the segment's end, where the jump to the edge is the identity."""
    return config.target == "edge" and config.skip >= NUM_TIMESTEPS


class Examples(NamedTuple):
    """What the loss is made of, a row an example: states, the ends of their segments, and the targets there."""

    z: Latents
    t: Timesteps
    edge: Timesteps
    target: Latents
    clean: Latents | None
    told: Told
    judge_tokens: dict[str, Array]


def make_train_step(
    apply: Apply,
    schedule: Schedule,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    latent_shape: tuple[int, int, int],
    auxiliary: Auxiliary = Auxiliary(),  # noqa: B008  (frozen)
    student_apply: Apply | None = None,
) -> StepFn:
    """The update (state, frozen, batch) -> (state, metrics) of one stage.

    apply: (variables, latents, timesteps, conditioning) -> the denoiser's own prediction. latent_shape: height, width
    and channels of the latents. auxiliary: what the weights in
    ``frozen.auxiliary`` belong to. student_apply: of a student that is told its guidance scale; it takes the scale's
    embedding as well.
    """
    draw_states, jump, distance = SOURCES[config.states], JUMPS[config.target], DISTANCES[config.distance]
    setting = Setting(apply, schedule, config, auxiliary, student_apply)
    terms, rivals_of = active_terms(setting), rival_terms(setting)

    def train_step(state: TrainState, frozen: Frozen, batch: Batch):
        n = batch.jumps.shape[0]
        told = Told(batch.conditioning, batch.guidance_scale)
        noise = jax.random.normal(rng.stream(batch.seed, "noise", state.step), (n, *latent_shape))

        def teacher_x0(told, z, t):
            predict = partial(apply, {"params": frozen.teacher})
            unconditional = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(z), *a.shape[1:])), frozen.unconditional)
            output = guided_predict(predict, z, t, told.conditioning, unconditional, told.guidance_scale)
            return predict_x0_eps(schedule, output, z, t).x0

        def student_x0(params, told, z, t):
            output = setting.student_output(student_variables(params, frozen.teacher, config), z, t, told)
            return predict_x0_eps(schedule, output, z, t).x0

        keys = (rng.stream(batch.seed, name, state.step) for name in ("timesteps", "student_samples"))
        source = Source(schedule, config, partial(teacher_x0, told), partial(student_x0, state.params, told), *keys)
        rows = Rows(batch.jumps, batch.num_segments, split_batch(noise), batch.latents)
        (z_m, t_m, z_n, t_n, edge, clean), pool = draw_states(source, rows, state.pool)

        if ends_at_edge(config):
            target = z_n
        else:
            target_params = state.params if config.target_network == "student" else state.ema
            target = jump(schedule, z_n, student_x0(target_params, told, z_n, t_n), t_n, edge)
        target = jax.lax.stop_gradient(target)
        learnt = partial(auxiliary.latent_distance, frozen.auxiliary) if auxiliary.latent_lpips else None

        def seen(x0, rows, key):
            teacher = partial(teacher_x0, rows.told)
            return Inputs(x0, rows.clean, rows.told, frozen.teacher, teacher, key, frozen.auxiliary, rows.judge_tokens)

        def loss_fn(params, rows, key):
            x0 = student_x0(params, rows.told, rows.z, rows.t)
            prediction = jump(schedule, rows.z, x0, rows.t, rows.edge)
            losses = {"consistency": distance(prediction, rows.target, learnt).mean()}
            loss = config.consistency_weight * losses["consistency"]
            # Terms and rivals see the answers for all states; those for the less noisy ones stay as they are.
            noisy = (rows.t >= config.terms_min_timestep)[:, None, None, None]
            learning = jnp.where(noisy, x0, jax.lax.stop_gradient(x0))
            for name, term in terms.items():
                rival = state.rivals[name].params if name in rivals_of else {}
                losses[name], reported = term.loss(rival, seen(learning, rows, rng.named(key, name)))
                losses |= {f"{name}_{entry}": value for entry, value in reported.items()}
                loss += config[name].weight * losses[name]
            return loss, (losses, x0)

        examples = Examples(z_m, t_m, edge, target, clean, told, batch.judge_tokens)
        key = rng.stream(batch.seed, "terms", state.step)
        (loss, (losses, x0)), grads = value_and_grad(loss_fn, state.params, examples, key, config.microbatches)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
        ema = None if state.ema is None else update_ema(state.ema, params, config.ema_decay)

        def rival_loss(term, params, drawn, key):
            x0, rows = drawn
            return term.rival_loss(params, seen(x0, rows, key)), ({}, ())

        rivals, drawn = dict(state.rivals), (jax.lax.stop_gradient(x0), examples)
        for name, term in rivals_of.items():
            key = rng.stream(batch.seed, f"{name}_rival", state.step)
            rival_fn = partial(rival_loss, term)
            rivals[name], losses[f"{name}_rival"] = train_rival(rival_fn, rivals[name], drawn, key, config, name)
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        metrics = {"loss": loss, **norms, "num_segments": batch.num_segments}
        return TrainState(state.step + 1, params, opt_state, ema, pool, rivals), metrics | losses

    return train_step
