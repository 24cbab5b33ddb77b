"""The trajectory of training states against a teacher whose flow is known exactly."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import GaussianTeacher
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.diffusion.scheduler_config import LAST_TIMESTEP
from mlcm_jax.diffusion.solvers import SOLVERS, ddim_step
from mlcm_jax.distillation.segments import draw_timesteps, segment_boundaries, short_step
from mlcm_jax.distillation.trajectory import integrate, trajectory_timesteps

pytestmark = pytest.mark.usefixtures("strict_arrays")

SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
SCHEDULE = Schedule.from_config(SDXL)
TEACHER = GaussianTeacher(SCHEDULE, mean=0.7, std=0.4)
T_M = jnp.asarray([550, 400, 120, 20])
T_N = T_M - 20
NOISE = jax.random.normal(jax.random.key(0), (4, 3, 3, 2))


@partial(jax.jit, static_argnames=("substeps", "solver"))
def trajectory(times, num_steps, substeps=1, solver="ddim"):
    return integrate(TEACHER.x0, SCHEDULE, NOISE, times, num_steps, substeps, solver=SOLVERS[solver])


def states(num_steps, substeps=1, *, solver="ddim", t_n=T_N):
    num_steps = jnp.int32(num_steps)
    times = trajectory_timesteps(T_M, t_n, num_steps, 64, substeps)
    return trajectory(times, num_steps, substeps, solver)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1.0), ("dpmpp_2m", 2.0)])
def test_z_m_converges_to_the_exact_flow_with_the_solvers_order(solver, order):
    exact = TEACHER.flow(NOISE, jnp.full_like(T_M, LAST_TIMESTEP), T_M)
    errors = [np.abs(states(k, solver=solver)[0] - exact).max(axis=(1, 2, 3)) for k in (16, 32, 64)]
    assert (errors[0] > 10.0 ** -(order + 2)).all(), "too small to measure an order"
    orders = np.stack([np.log2(errors[0] / errors[1]), np.log2(errors[1] / errors[2])])
    # Down to t = 20 the last step spans most of the log-SNR: 64 steps are too few to see its second order.
    np.testing.assert_allclose(orders[:, : 3 if solver == "dpmpp_2m" else 4], order, atol=0.25)


def test_z_n_converges_to_the_exact_flow_from_z_m_with_the_substeps():
    t_n = jnp.maximum(T_M - 250, 0)
    errors = []
    for substeps in (4, 8, 16):
        z_m, z_n = states(3, substeps, t_n=t_n)
        errors.append(np.abs(z_n - TEACHER.flow(z_m, T_M, t_n)).max())
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 1.0, atol=0.25)


@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_z_n_is_one_ddim_step_of_z_m(num_steps):
    z_m, z_n = states(num_steps)
    np.testing.assert_allclose(z_n, ddim_step(SCHEDULE, z_m, TEACHER.x0(z_m, T_M), T_M, T_N), rtol=1e-5, atol=1e-5)


def test_one_step_is_one_ddim_step_from_the_noise():
    top = jnp.full_like(T_M, LAST_TIMESTEP)
    expected = ddim_step(SCHEDULE, NOISE, TEACHER.x0(NOISE, top), top, T_M)
    np.testing.assert_allclose(states(1)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_state_at_the_first_timestep_is_the_noise_itself():
    top = jnp.full_like(T_M, LAST_TIMESTEP)
    num_steps = jnp.int32(1)
    z_m, _ = trajectory(trajectory_timesteps(top, top - 20, num_steps, 64), num_steps)
    np.testing.assert_array_equal(z_m, NOISE)


@settings(max_examples=25)
@given(st.integers(1, 16), st.data())
def test_times_fall_from_pure_noise_to_t_m_and_end_inside_the_segment(num_segments, data):
    segment = data.draw(st.integers(0, num_segments - 1))
    skip = data.draw(st.integers(1, 300))
    each = jnp.full((8,), segment)
    t_m = draw_timesteps(jax.random.key(data.draw(st.integers(0, 999))), each, num_segments)
    upper, lower = segment_boundaries(each, num_segments)
    t_n = short_step(t_m, skip, lower)
    num_steps = segment + 1
    substeps = data.draw(st.integers(1, 4))
    times = np.asarray(trajectory_timesteps(t_m, t_n, jnp.int32(num_steps), num_segments, substeps))
    assert times.shape == (num_segments + substeps + 1, 8)
    assert (times[0] == LAST_TIMESTEP).all()
    assert (np.diff(times, axis=0) <= 0).all()
    np.testing.assert_array_equal(times[num_steps], t_m)
    assert (times[num_steps + substeps :] == np.asarray(t_n)).all()
    assert (np.asarray(t_m) <= upper).all() and (times >= np.asarray(lower)).all()
    steps = np.diff(times[: num_steps + 1], axis=0)
    assert (steps.max(axis=0) - steps.min(axis=0) <= 1).all(), "the steps to t_m are equal but for rounding"


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_only_the_steps_that_are_needed_run(num_steps):
    calls = []

    def counted_x0(z, t):
        jax.debug.callback(calls.append, t[0])
        return TEACHER.x0(z, t)

    @jax.jit
    def run(num_steps):
        times = trajectory_timesteps(T_M, T_N, num_steps, 8)
        return integrate(counted_x0, SCHEDULE, NOISE, times, num_steps)

    jax.block_until_ready(run(jnp.int32(num_steps)))
    jax.effects_barrier()
    assert len(calls) == num_steps + 1
