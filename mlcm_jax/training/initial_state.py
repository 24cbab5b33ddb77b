"""The state of a run at step 0, and the shapes of a batch: with all that any of the stages needs."""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from mlcm_jax import rng
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.distillation.context import Apply, DistillationContext
from mlcm_jax.distillation.frozen_networks import FrozenNetworks
from mlcm_jax.distillation.losses import CriticShapes, create_critics, network_loads
from mlcm_jax.distillation.state import TrainState, create, with_guidance_embedding
from mlcm_jax.distillation.states import empty_buffer
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.models import lora
from mlcm_jax.training.batch_plan import source_of
from mlcm_jax.training.optimizer import stage_optimizer
from mlcm_jax.training.stages import Stage
from mlcm_jax.types import Batch, Params, TextConditioning


@dataclasses.dataclass(frozen=True, eq=False)  # jax.jit hashes it: by identity, as a configuration has no hash
class InitialState:
    """Makes the state at step 0. shapes: of the teacher's weights and of a batch. latent_shapes: height, width and
    channels for each size of images."""

    stages: Sequence[Stage]
    apply: Apply
    schedule: Schedule
    shapes: CriticShapes
    latent_shapes: Sequence[tuple[int, int, int]]

    def __call__(self, start: Params | None) -> TrainState:
        """start: what the trained weights start from, float32; None for a LoRA that changes nothing yet."""
        config, shapes = self.stages[0].config, self.shapes
        if config.trainable == "lora":
            key = rng.stream(config.seed, "init", 0)
            as_teacher = lora.init(key, shapes.teacher, config.lora.rank, config.lora.targets)
            params = as_teacher if start is None else start
        else:
            params = as_teacher = with_guidance_embedding(cast(Params, start), config.guidance_embedding_dim)
        streams = any(source_of(stage).uses_buffer for stage in self.stages)
        buffers = tuple(empty_buffer(config.batch_size, shape) for shape in self.latent_shapes) if streams else (None,)
        critics = {}
        for stage in self.stages:
            key = rng.stream(config.seed, "rivals", 0)
            critics |= create_critics(
                DistillationContext(self.apply, self.schedule, stage.config), key, as_teacher, shapes
            )
        return create(
            params,
            stage_optimizer(self.stages),
            with_ema=config.ema_decay > 0,
            trajectory_buffer=buffers[0] if len(buffers) == 1 else buffers,
            critics=critics,
            with_previous=any(stage.config.teacher_network == "previous" for stage in self.stages),
        )


def batch_shapes(
    stage: Stage,
    architecture: Pipeline,
    conditioning: TextConditioning,
    latents: Any,
    replicated: NamedSharding,
    networks: FrozenNetworks,
) -> Batch:
    """ShapeDtypeStructs, with shardings, of what a stage's step takes. conditioning, latents: those of a batch.
    architecture: the teacher in shapes."""
    config = stage.config

    def examples(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=latents.sharding)

    one: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    seed: Any = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=replicated)
    renews: Any = jax.ShapeDtypeStruct((), jnp.bool_, sharding=replicated)
    asked = network_loads(config, architecture)
    tokens = {role: examples(jnp.int32, t.shape[1]) for role, t in networks.tokenize([""]).items() if role in asked}
    return Batch(
        conditioning=conditioning,
        trajectory_step=examples(jnp.int32),
        num_segments=one,
        guidance_scale=examples(jnp.float32),
        seed=seed,
        latents=latents if source_of(stage).reads_latents else None,
        prompt_tokens=tokens,
        renews_teacher=renews if config.teacher_network == "previous" else None,
        without_prompt=examples(jnp.bool_) if config.empty_prompts else None,
    )
