"""Steps of the reverse SDE: marginals, the deterministic limit, and the papers' own formulas."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import GaussianTeacher
from scheduler_configs import SD21, SDXL

from mlcm_jax.diffusion.parameterization import add_noise
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.diffusion.solvers import SOLVERS, ddim_step

pytestmark = pytest.mark.usefixtures("strict_arrays")

SCHEDULE = Schedule.from_config(SDXL)
ZERO_SNR = Schedule.from_config({**SD21, "rescale_betas_zero_snr": True})
NAMES = ["ddim_sde", "er_sde"]
N = 4096
SHAPE = (N, 4, 4, 1)


def draw(seed):
    return jax.random.normal(jax.random.key(seed), SHAPE)


def step(name, schedule, z, x0, t, s, strength, seed=7):
    t, s = (jnp.full(len(z), u, jnp.int32) for u in (t, s))
    return SOLVERS[name].step(schedule, z, x0, x0, t, t, s, noise=draw(seed)[: len(z)], strength=strength)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO_SNR], ids=["sdxl", "zero snr"])
@pytest.mark.parametrize(("t", "s"), [(999, 800), (300, 100), (20, 0)])
def test_with_the_true_x0_the_marginal_is_kept(name, strength, schedule, t, s):
    x0 = 0.5 * draw(1)
    z = add_noise(schedule, x0, draw(2), jnp.full(N, t))
    left = step(name, schedule, z, x0, t, s, strength) - jnp.sqrt(schedule.alphas_cumprod[s]) * x0
    variance = 1 - float(schedule.alphas_cumprod[s])
    np.testing.assert_allclose(jnp.var(left), variance, rtol=0.02)
    assert abs(float(left.mean())) < 0.02
    assert abs(float(jnp.mean(left * x0))) < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_without_noise_it_is_ddim_to_the_bit(name):
    z, x0 = draw(1), draw(2)
    t, s = jnp.full(N, 700), jnp.full(N, 650)
    np.testing.assert_array_equal(step(name, SCHEDULE, z, x0, 700, 650, 0.0), ddim_step(SCHEDULE, z, x0, t, s))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("t", [999, 500, 0])
def test_a_step_to_the_same_timestep_is_the_identity(name, t):
    np.testing.assert_array_equal(step(name, ZERO_SNR, draw(1), draw(2), t, t, 1.0), draw(1))


def test_ddim_sde_is_ddpms_posterior():
    """Mean and variance of q(z_s | z_t, x0) (arXiv 2006.11239, eq. 7, over several timesteps)."""
    a_t, a_s = (float(SCHEDULE.alphas_cumprod[u]) for u in (600, 560))
    kept = a_t / a_s
    z, x0 = draw(1)[:4], draw(2)[:4]
    mean = (a_s**0.5 * (1 - kept) * x0 + kept**0.5 * (1 - a_s) * z) / (1 - a_t)
    deviation = ((1 - a_s) / (1 - a_t) * (1 - kept)) ** 0.5
    expected = mean + deviation * draw(7)[:4]
    np.testing.assert_allclose(step("ddim_sde", SCHEDULE, z, x0, 600, 560, 1.0), expected, atol=1e-4)


def test_er_sde_is_the_papers_first_order_step():
    """(arXiv 2309.06169, with the noise scale x (exp(x^0.3) + 10).)"""
    a_t, a_s = (float(SCHEDULE.alphas_cumprod[u]) for u in (600, 560))
    l_t, l_s = (((1 - a) / a) ** 0.5 for a in (a_t, a_s))
    ratio = (l_s * (np.exp(l_s**0.3) + 10)) / (l_t * (np.exp(l_t**0.3) + 10))
    z, x0 = draw(1)[:4], draw(2)[:4]
    expected = a_s**0.5 * (ratio * z / a_t**0.5 + (1 - ratio) * x0)
    expected += a_s**0.5 * (l_s**2 - l_t**2 * ratio**2) ** 0.5 * draw(7)[:4]
    np.testing.assert_allclose(step("er_sde", SCHEDULE, z, x0, 600, 560, 1.0), expected, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_many_steps_have_the_marginals_of_the_data(name):
    """Solved from noise with the exact E[x0 | z]: the deviation's error falls with the steps, in first order."""
    teacher, end = GaussianTeacher(ZERO_SNR, mean=0.6, std=0.3), 199
    abar = float(ZERO_SNR.alphas_cumprod[end])
    mean, deviation = 0.6 * abar**0.5, (0.09 * abar + 1 - abar) ** 0.5

    @jax.jit
    def one(z, t, s, noise):
        return SOLVERS[name].step(ZERO_SNR, z, teacher.x0(z, t), z, t, t, s, noise=noise, strength=1.0)

    def error(num_steps):
        z = draw(3)
        for i, (t, s) in enumerate(itertools.pairwise(np.linspace(999, end, num_steps + 1).astype(int))):
            z = one(z, jnp.full(N, int(t)), jnp.full(N, int(s)), draw(100 + i))
        assert abs(float(z.mean()) - mean) < 0.02
        return abs(float(z.std()) - deviation)

    few, many = error(10), error(80)
    assert few > 5e-3 and many < few / 4, (few, many)
