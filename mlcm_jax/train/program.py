"""The step of a run and its abstract arguments, built from config.json files alone: what is planned, compiled, run."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mlcm_jax import sharding
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import Pipeline, conditioning_shapes
from mlcm_jax.models import lora
from mlcm_jax.models.unet import UNet2DConditionModel
from mlcm_jax.train import rng
from mlcm_jax.train.flops import count_flops
from mlcm_jax.train.optim import make_optimizer
from mlcm_jax.train.plan import Plan, make_plan
from mlcm_jax.train.state import TrainState, create
from mlcm_jax.train.step import Frozen, make_train_step
from mlcm_jax.types import Params, TextConditioning


@dataclasses.dataclass(frozen=True)
class Program:
    """step: jit-ed (state, frozen, conditioning) -> (state, metrics); the state's buffers are donated.

    state, frozen, conditioning: trees of ShapeDtypeStructs with shardings, as the step takes them.
    latent_shape: height, width, channels. image_size: pixels.
    """

    step: Any
    state: TrainState
    frozen: Frozen
    conditioning: TextConditioning
    latent_shape: tuple[int, int, int]
    image_size: int
    schedule: Schedule
    mesh: Mesh
    plan: Plan
    config: ConfigDict

    def init_state(self, teacher: Params | None) -> TrainState:
        """The state at step 0. teacher: the teacher's weights, float32; needed to train all weights only."""
        config, like = self.config, self.state
        optimizer = make_optimizer(config.optim, config.num_steps)
        shardings = jax.tree.map(lambda a: a.sharding, like)

        def init_lora():
            key = rng.stream(config.seed, "init", 0)
            params = lora.init(key, self.frozen.teacher, config.lora.rank, config.lora.targets)
            return create(params, optimizer, with_ema=config.ema_decay > 0)

        def init_full(params):
            return create(params, optimizer, with_ema=config.ema_decay > 0)

        if config.trainable == "lora":
            return jax.jit(init_lora, out_shardings=shardings)()
        return jax.jit(init_full, out_shardings=shardings)(teacher)


def build_program(config: ConfigDict, architecture: Pipeline, devices=None) -> Program:
    """Lay a run out on ``devices`` (all of them by default); nothing is allocated and nothing is compiled.

    architecture: a pipeline whose parameters are ShapeDtypeStructs (``read_architecture``).
    Raises UserError for a mesh or an image size that does not fit.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    unet = architecture.unet
    schedule = Schedule.from_config(architecture.scheduler_config)
    image_size, latent_shape = _sizes(config, architecture)
    _check_batch(config, mesh)
    optimizer = make_optimizer(config.optim, config.num_steps)
    batch_sharding = sharding.batch_sharding(mesh)

    module = UNet2DConditionModel.from_config(unet.config, jnp.dtype(config.compute_dtype), remat=config.remat)
    train_step = make_train_step(
        module.apply,
        schedule,
        optimizer,
        config,
        latent_shape,
        constrain=lambda latents: jax.lax.with_sharding_constraint(latents, batch_sharding),
    )

    def init_state(params):
        if config.trainable == "lora":
            params = lora.init(jax.random.key(0), params, config.lora.rank, config.lora.targets)
        return create(params, optimizer, with_ema=config.ema_decay > 0)

    state = jax.eval_shape(init_state, _cast(unet.params, jnp.float32))
    state = _place(state, sharding.param_shardings(state, mesh, config.sharding_rules))
    teacher = _cast(unet.params, config.frozen_dtype)
    teacher = _place(teacher, sharding.param_shardings(teacher, mesh, config.sharding_rules))
    replicated = NamedSharding(mesh, PartitionSpec())
    frozen = Frozen(teacher, _place_all(conditioning_shapes(architecture, 1), replicated))
    conditioning = _place_all(conditioning_shapes(architecture, config.batch_size), batch_sharding)

    average_trips = (config.num_segments + 1) / 2 + 1
    plan = make_plan(
        config,
        mesh,
        image_size=image_size,
        state=state,
        frozen=frozen,
        flops_per_step=count_flops(train_step, state, frozen, conditioning, while_trips=average_trips),
    )
    state_shardings = jax.tree.map(lambda a: a.sharding, state)
    step = jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings, replicated))
    return Program(step, state, frozen, conditioning, latent_shape, image_size, schedule, mesh, plan, config)


def _sizes(config: ConfigDict, architecture: Pipeline) -> tuple[int, tuple[int, int, int]]:
    """Image size in pixels, and height, width and channels of the latents."""
    unet, vae = architecture.unet.config, architecture.vae.config
    downscale = 2 ** (len(vae["block_out_channels"]) - 1)
    image_size = config.image_size or unet["sample_size"] * downscale
    multiple = downscale * 2 ** (len(unet["block_out_channels"]) - 1)
    if image_size % multiple:
        raise UserError(f"config.image_size={image_size} does not fit this teacher: use a multiple of {multiple}.")
    side = image_size // downscale
    return image_size, (side, side, unet.get("in_channels", 4))


def _check_batch(config: ConfigDict, mesh: Mesh) -> None:
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % ways:
        raise UserError(
            f"config.batch_size={config.batch_size} cannot be spread over {ways} devices (data x fsdp): "
            f"use a multiple of {ways}."
        )


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), tree)


def _place(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)


def _place_all(tree: Any, sharding_: NamedSharding) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding_), tree)
