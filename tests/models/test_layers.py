"""Normalisation of 16-bit activations."""

import jax.numpy as jnp
import numpy as np
import pytest

from mlcm_jax.models.layers import GroupNorm


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_group_norm_of_what_lies_far_from_zero(dtype, mean):
    """The variance of 16-bit numbers is a difference of means; it must stay as exact as the numbers are."""
    x = jnp.asarray(mean + np.random.default_rng(0).standard_normal((2, 8, 8, 8)), dtype)
    params = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    got = GroupNorm(2, 1e-6, jnp.float32).apply({"params": params}, x)
    grouped = np.asarray(x, np.float64).reshape(2, 64, 2, 4)
    centred = grouped - grouped.mean(axis=(1, 3), keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean(axis=(1, 3), keepdims=True) + 1e-6)
    np.testing.assert_allclose(got, expected.reshape(x.shape), atol=2e-5 if dtype == jnp.float32 else 1e-3)


def test_group_norm_of_a_constant_is_zero():
    x = jnp.full((1, 4, 4, 8), 3.0, jnp.bfloat16)
    params = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    np.testing.assert_allclose(GroupNorm(2, 1e-6, jnp.bfloat16).apply({"params": params}, x), 0, atol=1e-2)
