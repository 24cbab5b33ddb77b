"""The step of a run and its abstract arguments, built from config.json files alone: what is planned, compiled, run."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mlcm_jax import rng
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.distillation.frozen_networks import Auxiliary, read_auxiliary
from mlcm_jax.distillation.losses.base import Apply, Setting, Shapes, create_rivals
from mlcm_jax.distillation.segments import jumps_to_first_segment
from mlcm_jax.distillation.state import TrainState, create, with_guidance_embedding
from mlcm_jax.distillation.states import empty_pool
from mlcm_jax.distillation.step import Frozen, StepFn, make_train_step
from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import Pipeline, conditioning_shapes
from mlcm_jax.models import lora
from mlcm_jax.models.attention_backend import XLA, AttentionBackend
from mlcm_jax.models.unet import UNet2DConditionModel
from mlcm_jax.parallel import sharding
from mlcm_jax.training.flops import count_flops
from mlcm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from mlcm_jax.training.plan import Plan, make_plan
from mlcm_jax.training.stages import Stage, read_stages
from mlcm_jax.types import Batch, Params, TextConditioning


@dataclasses.dataclass(frozen=True)
class StageProgram:
    """step: jit-ed (state, frozen, batch) -> (state, metrics); the state's buffers are donated. Stages that differ only
    in what a batch holds share it. batch: its ShapeDtypeStructs with shardings. flops: of a step, without
    what is recomputed to save memory."""

    stage: Stage
    step: Any
    batch: Batch
    flops: float


@dataclasses.dataclass(frozen=True)
class Program:
    """The steps of all stages; state, frozen: trees of ShapeDtypeStructs with shardings, as the steps take them.

    latent_shape: height, width, channels. image_size: pixels.
    """

    stages: tuple[StageProgram, ...]
    state: TrainState
    frozen: Frozen
    latent_shape: tuple[int, int, int]
    image_size: int
    schedule: Schedule
    mesh: Mesh
    plan: Plan
    config: ConfigDict
    auxiliary: Auxiliary
    create_state: Callable[[Params | None], TrainState]

    def init_state(self, start: Params | None) -> TrainState:
        """The state at step 0. start: what the trained weights start from, float32: the teacher's UNet or a LoRA, whose
        memory the state takes over; None for a LoRA that changes nothing yet."""
        shardings = jax.tree.map(lambda a: a.sharding, self.state)
        return jax.jit(self.create_state, out_shardings=shardings, donate_argnums=0)(start)


def build_program(config: ConfigDict, architecture: Pipeline, devices=None) -> Program:
    """Lay a run out on ``devices`` (all of them by default); nothing is allocated and nothing is compiled.

    architecture: a pipeline whose parameters are ShapeDtypeStructs (``read_architecture``).
    Raises UserError for a mesh or an image size that does not fit.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    unet = architecture.unet
    if unet.config.get("time_cond_proj_dim"):
        raise UserError(
            "The teacher's UNet has time_cond_proj_dim: it is a student that is told its guidance scale, and such "
            "ones cannot be distilled further; name the model that it was made from."
        )
    schedule = Schedule.from_config(architecture.scheduler_config)
    image_size, latent_shape = _sizes(config, architecture)
    _check_batch(config, mesh)
    stages = read_stages(config)
    batch_sharding, replicated = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    teacher = _cast(unet.params, config.frozen_dtype)
    teacher = _place(teacher, sharding.param_shardings(teacher, mesh, config.sharding_rules))
    auxiliary = read_auxiliary([stage.config for stage in stages], architecture)
    others = auxiliary.shapes(config.frozen_dtype)
    others = _place(others, sharding.param_shardings(others, mesh, config.sharding_rules))
    frozen = Frozen(teacher, _place_all(conditioning_shapes(architecture, 1), replicated), others)
    conditioning = _place_all(conditioning_shapes(architecture, config.batch_size), batch_sharding)
    latents = jax.ShapeDtypeStruct((config.batch_size, *latent_shape), jnp.float32, sharding=batch_sharding)

    attention, remat = attention_backend(config, mesh), config.remat and config.remat_policy
    dtype = jnp.dtype(config.compute_dtype)
    module = UNet2DConditionModel.from_config(unet.config, dtype, remat, attention, config.unroll)
    create_state = partial(_create, stages, module.apply, schedule, Shapes(teacher, conditioning, latents))
    state = jax.eval_shape(create_state, None if config.trainable == "lora" else _cast(unet.params, jnp.float32))
    pool = _place_all(state.pool, batch_sharding)
    state = _place(state, sharding.param_shardings(state, mesh, config.sharding_rules)).replace(pool=pool)
    state_shardings = jax.tree.map(lambda a: a.sharding, state)

    def make_step(module: UNet2DConditionModel, stage_config: ConfigDict) -> StepFn:
        step = make_train_step(
            module.apply,
            schedule,
            stage_optimizer(stages),
            stage_config,
            latent_shape,
            auxiliary=auxiliary,
            student_apply=module.with_guidance_embedding(config.guidance_embedding_dim).apply,
        )
        return sharding.traced_on(mesh, step)

    # A kernel's products are not seen in the jaxpr, and those that only save memory are no work for an example.
    counted = UNet2DConditionModel.from_config(unet.config, dtype, attention=XLA)
    compiled, programs = {}, []
    for stage in stages:
        batch = _batch_shapes(stage.config, conditioning, latents, replicated, auxiliary)
        jitted = jax.jit(make_step(module, stage.config), donate_argnums=0, out_shardings=(state_shardings, replicated))
        trips = average_trips(stage.config)
        flops = count_flops(make_step(counted, stage.config), state, frozen, batch, while_trips=trips)
        step = compiled.setdefault(stage.program_key(), jitted)
        programs.append(StageProgram(stage, step, batch, flops))
    plan = make_plan(programs, mesh, image_size=image_size, state=state, frozen=frozen)
    numbers = (latent_shape, image_size, schedule, mesh, plan, config)
    return Program(tuple(programs), state, frozen, *numbers, auxiliary, create_state)


def attention_backend(config: ConfigDict, mesh: Mesh) -> AttentionBackend:
    """What computes the UNet's attention on the devices of a mesh; raises UserError where they cannot."""
    return AttentionBackend(config.attention, mesh.devices.flat[0].platform, mesh)


def average_trips(config: ConfigDict) -> float:
    """Turns that the loop of a trajectory with a traced length takes on average, over all segments ("mds" has one)."""
    first = jumps_to_first_segment(config.timesteps)
    return first + (config.num_segments - 1) / 2 + config.solver_steps


def stage_optimizer(stages: Sequence[Stage]) -> optax.GradientTransformation:
    """The optimizer of a run: a stage with another learning rate than the one before begins a schedule of its own."""
    config = stages[0].config
    return make_optimizer(config.optim, config.num_steps, _restarts(stages))


def stage_learning_rate(stages: Sequence[Stage]) -> optax.Schedule:
    """The learning rate of ``stage_optimizer`` at each step (0 for the first)."""
    config = stages[0].config
    return learning_rate_schedule(config.optim, config.num_steps, _restarts(stages))


def _restarts(stages: Sequence[Stage]) -> dict[int, float]:
    rates = [(stage.start, stage.config.optim.learning_rate) for stage in stages]
    return {start: rate for (_, before), (start, rate) in itertools.pairwise(rates) if rate != before}


def _create(
    stages: Sequence[Stage], apply: Apply, schedule: Schedule, shapes: Shapes, start: Params | None
) -> TrainState:
    """The state at step 0, with all that any of the stages needs. start: as ``Program.init_state`` takes it."""
    config = stages[0].config
    if config.trainable == "lora":
        key = rng.stream(config.seed, "init", 0)
        as_teacher = lora.init(key, shapes.teacher, config.lora.rank, config.lora.targets)
        params = as_teacher if start is None else start
    else:
        params = as_teacher = with_guidance_embedding(cast(Params, start), config.guidance_embedding_dim)
    n, height, width, channels = shapes.latents.shape
    pool, rivals = None, {}
    for stage in stages:
        if stage.config.states == "streaming":
            pool = empty_pool(n, (height, width, channels))
        key = rng.stream(config.seed, "rivals", 0)
        rivals |= create_rivals(Setting(apply, schedule, stage.config), key, as_teacher, shapes)
    return create(params, stage_optimizer(stages), with_ema=config.ema_decay > 0, pool=pool, rivals=rivals)


def _batch_shapes(
    config: ConfigDict, conditioning: TextConditioning, latents, replicated: NamedSharding, auxiliary: Auxiliary
) -> Batch:
    def row(dtype, *shape) -> Any:
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=latents.sharding)

    one: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    seed: Any = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=replicated)
    return Batch(
        conditioning=conditioning,
        jumps=row(jnp.int32),
        num_segments=one,
        guidance_scale=row(jnp.float32),
        seed=seed,
        latents=latents if config.states == "data" else None,
        judge_tokens={role: row(jnp.int32, tokens.shape[1]) for role, tokens in auxiliary.tokenize([""]).items()}
        if config.preference.weight > 0
        else {},
    )


def _sizes(config: ConfigDict, architecture: Pipeline) -> tuple[int, tuple[int, int, int]]:
    """Image size in pixels, and height, width and channels of the latents."""
    unet, downscale = architecture.unet.config, architecture.downscale
    image_size = config.image_size or architecture.latent_side * downscale
    multiple = downscale * 2 ** (len(unet["block_out_channels"]) - 1)
    if image_size % multiple:
        raise UserError(f"config.image_size={image_size} does not fit this teacher: use a multiple of {multiple}.")
    side = image_size // downscale
    return image_size, (side, side, unet.get("in_channels", 4))


def _check_batch(config: ConfigDict, mesh: Mesh) -> None:
    ways, parts = mesh.shape["data"] * mesh.shape["fsdp"], config.microbatches
    if config.batch_size % (ways * parts):
        in_parts = f" in {parts} microbatches" if parts > 1 else ""
        raise UserError(
            f"config.batch_size={config.batch_size} cannot be spread over {ways} devices (data x fsdp){in_parts}: "
            f"use a multiple of {ways * parts}."
        )


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), tree)


def _place(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)


def _place_all(tree: Any, sharding_: NamedSharding) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding_), tree)
