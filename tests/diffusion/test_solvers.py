import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import GaussianTeacher, MixtureTeacher
from scheduler_configs import SD21, SDXL

from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.diffusion.solvers import ddim_step, dpmpp_2m_step

pytestmark = pytest.mark.usefixtures("strict_arrays")

SCHEDULE = Schedule.from_config(SDXL)
Z = jax.random.normal(jax.random.key(0), (4, 4, 4, 2))
TEACHER = GaussianTeacher(SCHEDULE, mean=0.7, std=0.5)


def at(t):
    return jnp.full((Z.shape[0],), int(t))


def solve(num_steps, order, end):
    """Evenly spaced steps from 999 to ``end``."""
    z, times = Z, np.linspace(999, end, num_steps + 1)
    x0_prev, t_prev = jnp.zeros_like(Z), at(999)
    for t, s in zip(map(at, times[:-1]), map(at, times[1:]), strict=True):
        x0 = TEACHER.x0(z, t)
        z = ddim_step(SCHEDULE, z, x0, t, s) if order == 1 else dpmpp_2m_step(SCHEDULE, z, x0, x0_prev, t_prev, t, s)
        x0_prev, t_prev = x0, t
    return z


@pytest.mark.parametrize(("order", "largest_error"), [(1, 5e-3), (2, 2e-5)])
def test_convergence_order_on_gaussian_data(order, largest_error):
    # down to 399: closer to 0 the log-SNR moves so fast that 1000 timesteps are too coarse to show the limit
    steps, end = [25, 50, 100], 399
    exact = TEACHER.flow(Z, at(999), at(end))
    errors = [float(jnp.sqrt(jnp.mean(jnp.square(solve(n, order, end) - exact)))) for n in steps]
    slopes = -np.diff(np.log(errors)) / np.diff(np.log(steps))
    print(f"order {order}: errors {errors}, slopes {slopes}")
    assert np.all(np.abs(slopes - order) < 0.1)
    assert errors[-1] < largest_error


@pytest.mark.parametrize("jit", [False, True])
def test_a_step_to_the_same_timestep_is_the_identity(jit):
    step = jax.jit(ddim_step) if jit else ddim_step
    t = jnp.array([999, 500, 1, 0])
    np.testing.assert_array_equal(step(SCHEDULE, Z, 100 * jnp.ones_like(Z), t, t), Z)


def test_2m_without_an_earlier_prediction_is_ddim():
    t, s = at(999), at(875)
    x0 = TEACHER.x0(Z, t)
    got = dpmpp_2m_step(SCHEDULE, Z, x0, 1e6 * jnp.ones_like(Z), t, t, s)
    np.testing.assert_array_equal(got, ddim_step(SCHEDULE, Z, x0, t, s))


def test_zero_terminal_snr_is_finite():
    schedule = Schedule.from_config({**SD21, "rescale_betas_zero_snr": True})
    z = ddim_step(schedule, Z, jnp.ones_like(Z), at(999), at(800))
    z = dpmpp_2m_step(schedule, z, 2 * jnp.ones_like(Z), jnp.ones_like(Z), at(999), at(800), at(600))
    assert jnp.isfinite(z).all()


def test_gradients_are_finite_where_the_step_is_first_order():
    def loss(x0):
        return jnp.sum(dpmpp_2m_step(SCHEDULE, Z, x0, x0, at(999), at(999), at(800)))

    assert jnp.isfinite(jax.grad(loss)(Z)).all()


def test_gaussian_flow_solves_its_own_ode():
    t = at(600)
    for s in (599, 601):
        small_step = ddim_step(SCHEDULE, Z, TEACHER.x0(Z, t), t, at(s))
        np.testing.assert_allclose(TEACHER.flow(Z, t, at(s)), small_step, atol=1e-5)
    back = TEACHER.flow(TEACHER.flow(Z, t, at(100)), at(100), t)
    np.testing.assert_allclose(back, Z, atol=1e-5)


def test_mixture_of_one_is_a_gaussian():
    mixture = MixtureTeacher(SCHEDULE, 0.7 * jnp.ones((1, *Z.shape[1:])), 0.5)
    t = jnp.array([0, 100, 500, 999])
    np.testing.assert_allclose(mixture.x0(Z, t), TEACHER.x0(Z, t), atol=1e-5)
    np.testing.assert_allclose(mixture.eps(Z, t), TEACHER.eps(Z, t), atol=1e-4)
