"""What both sides of the speed benchmarks work on: an architecture by its config.json files, random weights that are
made on the device, and the settings, rows and draws of a training step."""

import json
import math
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mlcm_jax import rng
from mlcm_jax.config import base
from mlcm_jax.distillation.segments import draw_timesteps
from mlcm_jax.distillation.state import Frozen
from mlcm_jax.hub import names
from mlcm_jax.hub.pipeline import Pipeline, read_architecture
from mlcm_jax.models.unet import UNet2DConditionModel
from mlcm_jax.training.batch_plan import batch_plan
from mlcm_jax.training.program import Program, build_program
from mlcm_jax.types import Batch

ROOT = Path(__file__).parents[1]
FOLDERS = {"emoji": ROOT / "examples/emoji/teacher", "sdxl": ROOT / "configs/architectures/sdxl"}
MODELS = (*FOLDERS, "small")

# SDXL's architecture in small: what differs from configs/architectures/sdxl
SMALL = {
    "unet": {
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [1, 2, 2],
        "transformer_layers_per_block": [1, 1, 2],
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
        "norm_num_groups": 8,
        "sample_size": 8,
    },
    "vae": {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 64},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1},
}
SMALL["text_encoder_2"] = {**SMALL["text_encoder"], "projection_dim": 32}


def architecture_folder(model: str, scratch: Path) -> Path:
    """The folder of config.json files of one of ``MODELS``; that of "small" is written into ``scratch``."""
    if model != "small":
        return FOLDERS[model]
    folder = scratch / "small"
    shutil.copytree(FOLDERS["sdxl"], folder, dirs_exist_ok=True)
    for part, changes in SMALL.items():
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def step_settings(
    folder: Path, trainable: str, batch_size: int, dtype: str, *, remat: bool = False, rank: int = 64
) -> ConfigDict:
    """MLCM's stage 1 as ``config.base`` has it: streamed states, M = 8, skip 20, target at the segment's boundary."""
    config = base()
    config.update({"teacher": str(folder), "trainable": trainable, "batch_size": batch_size, "remat": remat})
    config.update({"compute_dtype": dtype, "frozen_dtype": dtype, "attention": "auto"})
    config.lora.update({"rank": rank, "alpha": float(rank)})
    # a large eps: rounding must not turn the sign of an update where the first losses are compared
    config.optim.update({"warmup_steps": 0, "learning_rate": 1e-4, "eps": 1e-3})
    return config


def make_program(config: ConfigDict) -> Program:
    """The program of ``config`` on the first device."""
    architecture = read_architecture(config.teacher, jnp.dtype(config.compute_dtype))
    return build_program(config, architecture, jax.devices()[:1])


WEIGHTS = "rbg"  # of random weights: a generator that compiles in no time


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _uniform(key, shape, dtype, width, offset):
    return offset + jax.random.uniform(key, shape, dtype, -width, width)


def random_params(shapes: Any, seed: int = 0) -> Any:
    """Random weights for a network's tree of shapes, made on the default device, one array at a time.

    Layers keep the size of what goes through them: kernels are uniform with variance 1 / fan_in, norms' scales lie
    around 1, nothing is left at 0.
    """
    key = jax.random.key(seed, impl=WEIGHTS)

    def draw(keys, leaf):
        path = tuple(str(k.key) for k in keys)
        shape = leaf.shape[1:] if names.is_stacked(path) else leaf.shape
        width = math.sqrt(3 / math.prod(shape[:-1])) if len(shape) > 1 else 0.5
        leaf_key = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
        return _uniform(leaf_key, leaf.shape, leaf.dtype, width, float(path[-1] == "scale"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def compile_random(shapes: Any) -> None:
    """Compile what ``random_params`` runs into the compilation cache, eight programs at a time."""
    key = jax.random.key(0, impl=WEIGHTS)
    distinct = {(leaf.shape, jnp.dtype(leaf.dtype)) for leaf in jax.tree.leaves(shapes)}
    with ThreadPoolExecutor(8) as pool:
        lowered = [_uniform.lower(key, *each, 1.0, 0.0) for each in distinct]
        list(pool.map(lambda program: program.compile(), lowered))


def random_inputs(shapes: Any, seed: int = 1) -> Any:
    """Standard normal numbers for a tree of shapes (conditioning, say), on the host."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda a: np.asarray(generator.standard_normal(a.shape, np.float32), a.dtype), shapes)


def random_frozen(program: Program) -> Frozen:
    """The teacher and the conditioning of its unconditional branch."""
    unconditional = jax.device_put(random_inputs(program.frozen.unconditional, 2))
    return Frozen(random_params(program.frozen.teacher), unconditional)


def batch_at(program: Program, step: int) -> Batch:
    """The batch of ``step`` (0 for the first), with random conditioning that does not depend on it."""
    stage = program.stages[0]
    rows = batch_plan((stage.stage,), step)
    return Batch(
        conditioning=jax.device_put(random_inputs(stage.batch.conditioning)),
        trajectory_step=jnp.asarray(rows.trajectory_step, jnp.int32),
        num_segments=jnp.int32(program.config.num_segments),
        guidance_scale=jnp.asarray(rows.guidance_scale),
        seed=jnp.asarray(rng.seed_words(program.config.seed)),
    )


def draws_at(program: Program, step: int, trajectory_step: np.ndarray) -> dict[str, np.ndarray]:
    """What the step draws by itself: the noise that trajectories start from, channels-last, and for each row a
    timestep in the segment of its next state."""
    config = program.config
    noise = jax.random.normal(rng.stream(config.seed, "noise", step), (len(trajectory_step), *program.latent_shape))
    following = jnp.minimum(jnp.asarray(trajectory_step), config.num_segments - 1)
    drawn = draw_timesteps(rng.stream(config.seed, "timesteps", step), following, config.num_segments)
    return {"noise": np.asarray(noise), "next_timesteps": np.asarray(drawn)}


def unet_evaluations(jitted, *args) -> int:
    """Rows that the UNets are called with in ``jitted(*args)``, which is traced and not run. Lowering it afterwards
    takes this trace."""
    rows = []

    def count(call, args, kwargs, context):
        if isinstance(context.module, UNet2DConditionModel) and context.method_name == "__call__":
            rows.append(len(args[0]))
        return call(*args, **kwargs)

    with nn.intercept_methods(count):
        jitted.trace(*args)
        if not rows:  # where a program counts the FLOPs of its own step, jax has the trace already
            jax.eval_shape(lambda *given: jitted.__wrapped__(*given), *args)
    return sum(rows)


def describe(model: str, scratch: Path, dtype: str) -> Pipeline:
    """One of ``MODELS`` without weights."""
    return read_architecture(architecture_folder(model, scratch), jnp.dtype(dtype))
