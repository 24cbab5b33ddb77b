"""aDDIM against its formula, in one step and in many, and the variance that it is there for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import GaussianTeacher
from scheduler_configs import SDXL

from mlcm_jax.diffusion.parameterization import add_noise
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.diffusion.solvers import SOLVERS, addim_step, ddim_step

pytestmark = pytest.mark.usefixtures("strict_arrays")

SCHEDULE = Schedule.from_config(SDXL)
TEACHER = GaussianTeacher(SCHEDULE, mean=0.7, std=0.5)
X, NOISE, X0 = jax.random.normal(jax.random.key(0), (3, 4, 16, 16, 4))
T, S = jnp.array([999, 700, 300, 40]), jnp.array([749, 400, 299, 1])


def step(name, z, x0, t, s, clean=None):
    return SOLVERS[name].knowing(clean).step(SCHEDULE, z, x0, x0, t, t, s)


@pytest.mark.parametrize("name", ["addim", "addim_data"])
def test_a_step_is_the_papers_and_takes_norms_of_each_example_alone(name):
    """arXiv 2403.06807, alg. 3, one example after the other in float64."""
    z = add_noise(SCHEDULE, X, NOISE, T)
    got = step(name, z, X0, T, S, X)
    abar = np.asarray(SCHEDULE.alphas_cumprod, np.float64)
    for i in range(4):
        (a_t, a_s), (s_t, s_s) = (np.sqrt(f(abar[[int(T[i]), int(S[i])]])) for f in (lambda v: v, lambda v: 1 - v))
        z_t, x_hat, x, d = (np.asarray(v[i], np.float64) for v in (z, X0, X, jnp.full(4, X[0].size)))
        eps = (z_t - a_t * x_hat) / s_t
        x_var = 0.75 * np.sum((x - x_hat) ** 2) / d if name == "addim_data" else 0.1 / (2 + a_t**2 / s_t**2)
        z_s_var = (a_s - a_t * s_s / s_t) ** 2 * x_var
        expected = a_s * x_hat + np.sqrt(s_s**2 + d / np.sum(eps**2) * z_s_var) * eps
        np.testing.assert_allclose(got[i], expected, rtol=1e-4, atol=1e-4)


def test_it_is_ddim_without_variance_and_the_identity_without_a_step():
    nothing = jnp.zeros((4, 1, 1, 1))
    np.testing.assert_allclose(
        addim_step(SCHEDULE, NOISE, X0, nothing, T, S), ddim_step(SCHEDULE, NOISE, X0, T, S), atol=1e-5
    )
    for name in ("addim", "addim_data"):
        np.testing.assert_array_equal(step(name, NOISE, X0, T, T, X), NOISE)


def test_it_converges_to_the_flow_with_order_one():
    def error(num_steps):
        z, times = NOISE, np.linspace(999, 399, num_steps + 1).astype(int)
        for t, s in itertools.pairwise(times):
            t, s = (jnp.full(4, int(u)) for u in (t, s))
            z = step("addim", z, TEACHER.x0(z, t), t, s)
        return float(jnp.sqrt(jnp.mean(jnp.square(z - TEACHER.flow(NOISE, jnp.full(4, 999), jnp.full(4, 399))))))

    errors = [error(n) for n in (25, 50, 100)]
    np.testing.assert_allclose(-np.diff(np.log2(errors)), 1.0, atol=0.15)
    assert errors[-1] < 1e-2


@pytest.mark.parametrize("t", [999, 850, 700])
def test_a_long_step_keeps_the_variance_that_ddim_loses(t):
    """Of unit Gaussian data, whose noised states all have variance 1: DDIM misses weight^2 Var(x0 | z) of it."""
    t, s = jnp.full(4, t), jnp.full(4, t - 250)
    teacher = GaussianTeacher(SCHEDULE, mean=0.0, std=1.0)
    z, error = (v / jnp.sqrt(jnp.square(v).mean(axis=(1, 2, 3), keepdims=True)) for v in (NOISE, X))
    x0 = teacher.x0(z, t)
    clean = x0 + jnp.sqrt(1 - SCHEDULE.alphas_cumprod[t])[:, None, None, None] * error  # Var(x0 | z) = sigma_t^2
    ddim, addim = (float(jnp.square(step(name, z, x0, t, s, clean)).mean()) for name in ("ddim", "addim_data"))
    (a, b) = (float(SCHEDULE.alphas_cumprod[u[0]]) for u in (t, s))
    np.testing.assert_allclose(ddim, (np.sqrt(a * b) + np.sqrt((1 - a) * (1 - b))) ** 2, rtol=1e-4)
    assert ddim < 0.98
    assert abs(addim - 1) < 0.4 * (1 - ddim)
