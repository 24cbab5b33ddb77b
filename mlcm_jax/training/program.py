"""The step of a run and its abstract arguments, built from config.json files alone: what is planned, compiled, run."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.frozen_networks import FrozenNetworks
from mlcm_jax.distillation.losses import CriticShapes, read_frozen_networks
from mlcm_jax.distillation.state import Frozen, TrainState
from mlcm_jax.distillation.step import TrainStep, make_train_step
from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import Pipeline, conditioning_shapes
from mlcm_jax.image_size import ImageSize, asked_size
from mlcm_jax.models.attention_backend import BACKENDS, AttentionBackend
from mlcm_jax.models.remat import REMAT_POLICIES
from mlcm_jax.models.unet import UNet2DConditionModel
from mlcm_jax.parallel import sharding
from mlcm_jax.rng import MAX_SEED
from mlcm_jax.rules import NOT_NEGATIVE, POSITIVE, Rule, between, check_rules, one_of
from mlcm_jax.training.batch_plan import source_of
from mlcm_jax.training.export import student_scheduler_config
from mlcm_jax.training.flops import count_flops
from mlcm_jax.training.initial_state import InitialState, batch_shapes
from mlcm_jax.training.optimizer import stage_optimizer
from mlcm_jax.training.plan import Plan, make_plan
from mlcm_jax.training.stages import Stage, num_buckets, read_stages, stage_at
from mlcm_jax.types import Batch, Params


def check(config: ConfigDict) -> None:
    """Raise UserError for settings of the compiled step that cannot work."""
    dtype = one_of("float32", "bfloat16")
    check_rules(
        config,
        {
            "guidance_scale_max": NOT_NEGATIVE,
            "empty_prompts": Rule(lambda v: 0 <= v < 1, "0 or more and less than 1"),
            "seed": between(0, MAX_SEED),
            "batch_size": POSITIVE,
            "microbatches": POSITIVE,
            "remat_policy": one_of(*REMAT_POLICIES),
            "compute_dtype": dtype,
            "frozen_dtype": dtype,
            "attention": one_of(*BACKENDS),
            "unroll": POSITIVE,
        },
    )
    if config.empty_prompts and config.negative_prompt:
        raise UserError(
            "config.empty_prompts trains the student without a prompt, and config.negative_prompt would put one there: "
            "leave negative_prompt empty; the student takes one when it is sampled."
        )


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

    latent_shape: height, width, channels. image_size: height and width in pixels; of the first of ``image_sizes``.
    stages: where there are several sizes, those of a stage one after the other.
    """

    stages: tuple[StageProgram, ...]
    state: TrainState
    frozen: Frozen
    latent_shape: tuple[int, int, int]
    image_sizes: tuple[ImageSize, ...]
    schedule: Schedule
    mesh: Mesh
    plan: Plan
    config: ConfigDict
    networks: FrozenNetworks
    create_state: Callable[[Params | None], TrainState]

    @property
    def image_size(self) -> ImageSize:
        return self.image_sizes[0]

    def init_state(self, start: Params | None) -> TrainState:
        """The state at step 0. start: what the trained weights start from, float32: the teacher's UNet or a LoRA, whose
        memory the state takes over; None for a LoRA that changes nothing yet."""
        shardings = jax.tree.map(lambda a: a.sharding, self.state)
        return jax.jit(self.create_state, out_shardings=shardings, donate_argnums=0)(start)


def stages_of(programs: Sequence[StageProgram]) -> tuple[Stage, ...]:
    """The stages of a run, of which each has a program for each size of images."""
    return tuple(program.stage for program in programs[:: num_buckets(programs[0].stage.config)])


def program_at(programs: Sequence[StageProgram], step: int) -> StageProgram:
    """The program of a step (0 for the first)."""
    sizes = num_buckets(programs[0].stage.config)
    return programs[stage_at(stages_of(programs), step) * sizes + step % sizes]


def build_program(config: ConfigDict, architecture: Pipeline, devices=None) -> Program:
    """Lay a run out on ``devices`` (all of them by default); nothing is allocated and nothing is compiled.

    architecture: a pipeline whose parameters are ShapeDtypeStructs (``read_architecture``).
    Raises UserError for a mesh or an image size that does not fit.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    _check_teacher(architecture)
    _check_batch(config, mesh)
    # The student's: where some schedulers lift the end of a zero terminal SNR, the one that is exported does not.
    schedule = Schedule.from_config(student_scheduler_config(architecture.scheduler_config))
    stages = read_stages(config)
    _check_prediction_types(stages, schedule)
    sizes = _image_sizes(config, stages, architecture)
    latent_shapes = [architecture.latent_shape(size) for size in sizes]
    networks = read_frozen_networks([stage.config for stage in stages], architecture)
    split, replicated = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    frozen = _frozen_shapes(config, architecture, networks, mesh)
    conditioning = _place_all(conditioning_shapes(architecture, config.batch_size), split)
    latents = [
        jax.ShapeDtypeStruct((config.batch_size, *shape), jnp.float32, sharding=split) for shape in latent_shapes
    ]
    shapes = CriticShapes(frozen.teacher, conditioning, latents[0])
    create_state = InitialState(stages, _student(config, architecture, mesh).apply, schedule, shapes, latent_shapes)
    state = _state_shapes(config, create_state, architecture, mesh)
    placed = (jax.tree.map(lambda a: a.sharding, state), replicated)

    def make_step(stage: Stage, bucket: int, *, counted: bool = False) -> TrainStep:
        settings = _for_counting(stage.config) if counted else stage.config
        module = _student(settings, architecture, mesh)
        student_apply = module.with_guidance_embedding(config.guidance_embedding_dim).apply
        context = DistillationContext(
            module.apply, schedule, settings, networks, student_apply, stage.former_prediction_type
        )
        own = bucket if len(sizes) > 1 else None
        step = make_train_step(context, stage_optimizer(stages), latent_shapes[bucket], own)
        return sharding.traced_on(mesh, step)

    steps, counts, programs = {}, {}, []
    for stage, bucket in itertools.product(stages, range(len(sizes))):
        batch = batch_shapes(stage, architecture, conditioning, latents[bucket], replicated, networks)
        key = (stage.program_key(), bucket)
        if key not in steps:
            step = jax.jit(make_step(stage, bucket), donate_argnums=0, out_shardings=placed)
            # A step that is counted itself is traced for that and compiled from the same trace.
            steps[key] = step, step if _counts_itself(config, mesh) else jax.jit(make_step(stage, bucket, counted=True))
        step, counted = steps[key]
        trips = source_of(stage).average_loop_trips(stage.config)
        if (key, trips) not in counts:
            counts[key, trips] = count_flops(counted, state, frozen, batch, while_trips=trips)
        programs.append(StageProgram(stage, step, batch, counts[key, trips]))
    return Program(
        stages=tuple(programs),
        state=state,
        frozen=frozen,
        latent_shape=latent_shapes[0],
        image_sizes=sizes,
        schedule=schedule,
        mesh=mesh,
        plan=make_plan(programs, mesh, image_sizes=sizes, state=state, frozen=frozen),
        config=config,
        networks=networks,
        create_state=create_state,
    )


def attention_backend(config: ConfigDict, mesh: Mesh) -> AttentionBackend:
    """What computes the UNet's attention on the devices of a mesh; raises UserError where they cannot."""
    return AttentionBackend(config.attention, mesh.devices.flat[0].platform, mesh)


def _counts_itself(config: ConfigDict, mesh: Mesh) -> bool:
    """Whether the step as it is compiled holds each of its products once, where they can be counted."""
    return not config.remat and (config.attention == "xla" or mesh.devices.flat[0].platform == "cpu")


def _for_counting(config: ConfigDict) -> ConfigDict:
    """A copy whose products are all seen in the jaxpr, where a kernel's are not, each once: what is computed again to
    save memory is no work for an example."""
    copy = config.copy_and_resolve_references()
    copy.attention, copy.remat = "xla", False
    return copy


def _student(config: ConfigDict, architecture: Pipeline, mesh: Mesh) -> UNet2DConditionModel:
    """The UNet as it is trained."""
    dtype = jnp.dtype(config.compute_dtype)
    remat = config.remat and config.remat_policy
    attention = attention_backend(config, mesh)
    return UNet2DConditionModel.from_config(architecture.unet.config, dtype, remat, attention, config.unroll)


def _frozen_shapes(config: ConfigDict, architecture: Pipeline, networks: FrozenNetworks, mesh: Mesh) -> Frozen:
    def placed(tree: Any) -> Any:
        return _place(tree, sharding.param_shardings(tree, mesh, config.sharding_rules))

    unconditional = _place_all(conditioning_shapes(architecture, 1), NamedSharding(mesh, PartitionSpec()))
    teacher = placed(_cast(architecture.unet.params, config.frozen_dtype))
    return Frozen(teacher, unconditional, placed(networks.shapes(config.frozen_dtype)))


def _state_shapes(config: ConfigDict, create_state: InitialState, architecture: Pipeline, mesh: Mesh) -> TrainState:
    start = None if config.trainable == "lora" else _cast(architecture.unet.params, jnp.float32)
    state = jax.eval_shape(create_state, start)
    buffer = _place_all(state.trajectory_buffer, sharding.batch_sharding(mesh))
    state = _place(state, sharding.param_shardings(state, mesh, config.sharding_rules))
    return state.replace(trajectory_buffer=buffer)


def _image_sizes(config: ConfigDict, stages: Sequence[Stage], architecture: Pipeline) -> tuple[ImageSize, ...]:
    """The sizes of a run; raises UserError for sizes that contradict one another and for data of one size."""
    asked = asked_size(config.image_size, config.height, config.width)
    if not config.buckets:
        return (asked or architecture.image_size,)
    pairs = all(len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size) for size in config.buckets)
    if asked or not pairs:
        raise UserError(
            f"config.buckets={tuple(config.buckets)!r} must be sizes (height, width) in pixels, and stands in the "
            "place of image_size, height and width."
        )
    if any(source_of(stage).reads_latents for stage in stages):
        raise UserError("config.buckets needs states that are sampled: a file of latents holds one size.")
    return tuple((height, width) for height, width in config.buckets)


def _check_teacher(architecture: Pipeline) -> None:
    if architecture.unet.config.get("time_cond_proj_dim"):
        raise UserError(
            "The teacher's UNet has time_cond_proj_dim: it is a student that is conditioned on its guidance scale, and "
            "such ones cannot be distilled further; name the model that it was made from."
        )


def _check_prediction_types(stages: tuple[Stage, ...], schedule: Schedule) -> None:
    ends_in_noise = float(schedule.alphas_cumprod[-1]) == 0
    if ends_in_noise and any(stage.config.student_prediction_type == "epsilon" for stage in stages):
        raise UserError(
            "config.student_prediction_type='epsilon' cannot tell x0 from pure noise, in which the teacher's noise "
            "schedule ends: use v_prediction or sample."
        )


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
