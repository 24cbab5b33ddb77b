import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlcm_jax.distillation.distances import l2, pseudo_huber
from mlcm_jax.distillation.distances.pseudo_huber import HUBER_C

pytestmark = pytest.mark.usefixtures("strict_arrays")

SHAPE = (3, 4, 4, 2)
DISTANCES = {"l2": l2, "pseudo_huber": pseudo_huber}
seeds = st.integers(0, 2**31 - 1)


def pair(seed, scale=1.0):
    a, b = jax.random.split(jax.random.key(seed))
    return jax.random.normal(a, SHAPE), scale * jax.random.normal(b, SHAPE)


@pytest.mark.parametrize("name", DISTANCES)
@given(seed=seeds)
def test_a_distance_is_symmetric_and_zero_only_between_equals(name, seed):
    distance, (a, b) = DISTANCES[name], pair(seed)
    np.testing.assert_array_equal(distance(a, a), np.zeros(3))
    np.testing.assert_array_equal(distance(a, b), distance(b, a))
    assert distance(a, b).shape == (3,) and bool((distance(a, b) > 0).all())


@pytest.mark.parametrize("name", DISTANCES)
def test_examples_do_not_mix(name):
    a, b = pair(0)
    moved = DISTANCES[name](a.at[1].add(1.0), b)
    np.testing.assert_array_equal(np.asarray(moved == DISTANCES[name](a, b)), [True, False, True])


def test_values():
    a, b = jnp.zeros(SHAPE), jnp.full(SHAPE, 3.0)
    np.testing.assert_allclose(l2(a, b), 9.0)
    np.testing.assert_allclose(pseudo_huber(a, b), np.hypot(3.0, HUBER_C) - HUBER_C, rtol=1e-6)


@pytest.mark.parametrize("name", DISTANCES)
def test_the_gradient_between_equals_is_zero_and_finite(name):
    a, _ = pair(0)
    gradient = jax.grad(lambda x: DISTANCES[name](x, a).mean())(a)
    np.testing.assert_array_equal(gradient, np.zeros(SHAPE))


@given(seeds)
def test_pseudo_huber_lies_below_the_absolute_difference_by_at_most_c(seed):
    a, b = pair(seed)
    absolute = jnp.abs(a - b).mean(axis=(1, 2, 3))
    below = np.asarray(absolute - pseudo_huber(a, b))
    assert (below > 0).all() and (below <= HUBER_C * 1.001).all()
