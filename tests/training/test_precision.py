"""A whole step in bfloat16 against the same step in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_runs import SCHEDULE, settings

from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.state import Frozen, create
from mlcm_jax.distillation.states import empty_buffer
from mlcm_jax.distillation.step import make_train_step
from mlcm_jax.hub.pipeline import network_shapes
from mlcm_jax.models.unet import UNet2DConditionModel
from mlcm_jax.rng import seed_words
from mlcm_jax.types import Batch, TextConditioning

CHANNELS, LATENT_SHAPE, ROWS = 64, (8, 8, 4), 4
UNET = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [CHANNELS],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["UpBlock2D"],
    "attention_head_dim": [2],
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}


def denoiser_weights(shapes):
    """As a trained teacher at t = 999 the network answers with what it is given: each latent channel is carried by many
    of the network's, of either sign, and read from all of them. The blocks add something small to that."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name != "kernel":
            return 0.05 * rng.standard_normal(leaf.shape) + (name == "scale")
        return 0.3 * rng.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    carriers = np.arange(CHANNELS)
    sign = np.where(carriers // 4 % 2, -1.0, 1.0)
    middle = np.zeros((3, 3, 1, 1))
    middle[1, 1] = 1.0
    carried = np.eye(4)[carriers % 4] * sign[:, None]
    params["conv_in"]["kernel"] = middle * carried.T * rng.uniform(0.5, 1.5, CHANNELS)
    params["conv_out"]["kernel"] = middle * carried * 8 / CHANNELS
    for resnet in ("resnets_0", "resnets_1"):  # of the joined channels, those of the state that comes from below
        joined = np.concatenate([np.eye(CHANNELS), np.zeros((CHANNELS, CHANNELS))])
        params["up_blocks_0"][resnet]["conv_shortcut"]["kernel"] = joined[None, None]
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16).astype(jnp.float32), params)


def conditioning(rng, n):
    hidden, pooled, ids = (jnp.asarray(rng.standard_normal((n, *s)), jnp.float32) for s in ((5, 16), (16,), (6,)))
    return TextConditioning(hidden, pooled, ids)


def loss_and_gradient(dtype, prediction_type):
    """A function of whether the output is rounded to bfloat16, as it was when the last layer ran in bfloat16."""
    module = UNet2DConditionModel.from_config(UNET, jnp.dtype(dtype))
    params = denoiser_weights(network_shapes(module, UNET))
    config, rng = settings(batch_size=ROWS, skip=1000, guidance_scale=8.0), np.random.default_rng(1)
    seed = jnp.asarray(seed_words(config.seed))
    batch = Batch(conditioning(rng, ROWS), jnp.zeros(ROWS, jnp.int32), jnp.int32(4), jnp.full(ROWS, 8.0), seed)
    frozen = Frozen(params, conditioning(rng, 1))
    schedule = dataclasses.replace(SCHEDULE, prediction_type=prediction_type)
    state = create(params, optax.sgd(1.0), trajectory_buffer=empty_buffer(ROWS, LATENT_SHAPE))

    def run(rounded, state, frozen):
        def apply(*args):
            output = module.apply(*args)
            assert output.dtype == jnp.float32
            return jnp.where(rounded, output.astype(jnp.bfloat16).astype(jnp.float32), output)

        context = DistillationContext(apply, schedule, config)
        after, metrics = make_train_step(context, optax.sgd(1.0), LATENT_SHAPE)(state, frozen, batch)
        steps = jax.tree.map(lambda a, b: (a - b).ravel(), state.params, after.params)
        return metrics["loss"], jnp.concatenate(jax.tree.leaves(steps))

    # XLA may leave roundings out where it pleases, on a CPU above all
    jitted = jax.jit(run, compiler_options={"xla_allow_excess_precision": False})
    return lambda rounded: jitted(rounded, state, frozen)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_bfloat16_step_is_the_float32_step_but_for_roundings_inside_the_network(prediction_type):
    """From pure noise with w = 8, where a rounding of the output counts ten times in the guided x0."""
    exact_loss, exact = loss_and_gradient("float32", prediction_type)(False)
    step = loss_and_gradient("bfloat16", prediction_type)

    def errors(rounded):
        loss, gradient = step(rounded)
        cosine = gradient @ exact / jnp.linalg.norm(gradient) / jnp.linalg.norm(exact)
        return abs(float(loss / exact_loss) - 1), 1 - float(cosine)

    loss, direction = errors(rounded=False)
    assert loss < 0.45 and direction < 0.017
    old_loss, old_direction = errors(rounded=True)
    assert old_loss > 0.45 and old_direction > 0.017
