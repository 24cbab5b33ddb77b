"""MCM's distance against its definition: clean latents, the norm of their difference, SNR + 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import SCHEDULE, settings

from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.distances import DISTANCES, Answers
from mlcm_jax.distillation.targets import TARGETS

Z, X, Y = jax.random.normal(jax.random.key(0), (3, 4, 5, 5, 2))
T, BOUNDARY = jnp.array([999, 700, 521, 250]), jnp.array([749, 499, 499, 0])


def distance(target, x0, other):
    """Between two answers for the same state, where ``target`` compares them."""
    context = DistillationContext(None, SCHEDULE, settings(target=target, distance="x0_norm"))
    answer = TARGETS[target].consistency_function
    prediction, aim = (answer(SCHEDULE, Z, x, T, BOUNDARY) for x in (x0, other))
    return DISTANCES["x0_norm"].measure(context, Answers(prediction, aim, T, BOUNDARY), {})


@pytest.mark.parametrize("target", ["boundary", "x0"])
def test_it_is_the_weighted_norm_of_the_difference_of_the_clean_latents(target):
    abar = np.asarray(SCHEDULE.alphas_cumprod, np.float64)[np.asarray(T)]
    norms = np.sqrt(np.square(np.asarray(X, np.float64) - np.asarray(Y)).sum(axis=(1, 2, 3)))
    np.testing.assert_allclose(distance(target, X, Y), norms * (abar / (1 - abar) + 1), rtol=1e-4)


@pytest.mark.parametrize("target", ["boundary", "x0"])
def test_between_equals_value_and_gradient_are_zero(target):
    gradient = jax.grad(lambda x: distance(target, x, X).sum())(X)
    np.testing.assert_array_equal(distance(target, X, X), 0)
    np.testing.assert_array_equal(gradient, 0)
