"""A network of two matrices and its batches, so that a step can be written down again in a few lines."""

import jax
import jax.numpy as jnp

from mlcm_jax.distillation.state import create
from mlcm_jax.distillation.states import empty_buffer
from mlcm_jax.rng import seed_words
from mlcm_jax.types import Batch, TextConditioning

LATENT_SHAPE = (4, 4, 2)


def toy_features(params, z, t, conditioning):
    """The hidden layer, which counts as the output of the middle block."""
    shift = (t / 1000 + conditioning.pooled.mean(axis=1))[:, None, None, None]
    return jnp.tanh(z @ params["a"] + shift)


def toy_apply(variables, z, t, conditioning, *, capture_intermediates=None, mutable=()):
    """The last two as flax has them: with ``mutable`` the features are returned beside the output, and their squares
    as those of a decoder's block."""
    hidden = toy_features(variables["params"], z, t, conditioning)
    output = hidden @ variables["params"]["b"]
    blocks = {"mid_block": {"__call__": (hidden,)}, "up_blocks_0": {"__call__": (hidden**2,)}}
    return (output, {"intermediates": blocks}) if mutable else output


def toy_params(seed):
    a, b = jax.random.split(jax.random.key(seed))
    return {"a": jax.random.normal(a, (2, 16)), "b": 0.2 * jax.random.normal(b, (16, 2))}


def toy_conditioning(n, seed):
    pooled = jax.random.normal(jax.random.key(seed), (n, 3))
    return TextConditioning(hidden_states=jnp.zeros((n, 2, 3)), pooled=pooled, time_ids=jnp.zeros((n, 6)))


def toy_batch(n, seed, jumps, num_segments, guidance_scale=3.0, run_seed=0):
    return Batch(
        conditioning=toy_conditioning(n, seed),
        trajectory_step=jnp.asarray(jumps, jnp.int32),
        num_segments=jnp.int32(num_segments),
        guidance_scale=jnp.full((n,), guidance_scale, jnp.float32),
        seed=jnp.asarray(seed_words(run_seed)),
    )


def toy_state(student, optimizer, n, **values):
    return create(student, optimizer, trajectory_buffer=empty_buffer(n, LATENT_SHAPE), **values)
