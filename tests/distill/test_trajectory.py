"""The trajectory of training states against a teacher whose flow is known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import GaussianTeacher
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.diffusion.solvers import ddim_step
from mlcm_jax.distill.segments import LAST_TIMESTEP, draw_timesteps, segment_edges, short_step
from mlcm_jax.distill.trajectory import denoising_timesteps, multistep_denoising

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


@jax.jit
def trajectory(times, num_jumps):
    return multistep_denoising(TEACHER.x0, SCHEDULE, NOISE, times, num_jumps)


def states(num_jumps):
    num_jumps = jnp.int32(num_jumps)
    return trajectory(denoising_timesteps(T_M, T_N, num_jumps, 64), num_jumps)


def test_z_m_converges_to_the_exact_flow_with_order_one():
    exact = TEACHER.flow(NOISE, jnp.full_like(T_M, LAST_TIMESTEP), T_M)
    errors = [np.abs(states(k)[0] - exact).max(axis=(1, 2, 3)) for k in (16, 32, 64)]
    assert (errors[0] > 1e-3).all(), "too small to measure an order"
    orders = np.log2(errors[0] / errors[1]), np.log2(errors[1] / errors[2])
    np.testing.assert_allclose(orders, 1.0, atol=0.25)


@pytest.mark.parametrize("num_jumps", [1, 3, 8])
def test_z_n_is_one_ddim_step_of_z_m(num_jumps):
    z_m, z_n = states(num_jumps)
    np.testing.assert_allclose(z_n, ddim_step(SCHEDULE, z_m, TEACHER.x0(z_m, T_M), T_M, T_N), rtol=1e-5, atol=1e-5)


def test_one_jump_is_one_ddim_step_from_the_noise():
    top = jnp.full_like(T_M, LAST_TIMESTEP)
    expected = ddim_step(SCHEDULE, NOISE, TEACHER.x0(NOISE, top), top, T_M)
    np.testing.assert_allclose(states(1)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_state_at_the_first_timestep_is_the_noise_itself():
    top = jnp.full_like(T_M, LAST_TIMESTEP)
    num_jumps = jnp.int32(1)
    z_m, _ = trajectory(denoising_timesteps(top, top - 20, num_jumps, 64), num_jumps)
    np.testing.assert_array_equal(z_m, NOISE)


@settings(max_examples=25)
@given(st.integers(1, 16), st.data())
def test_times_fall_from_pure_noise_to_t_m_and_end_inside_the_segment(num_segments, data):
    segment = data.draw(st.integers(0, num_segments - 1))
    skip = data.draw(st.integers(1, 300))
    each = jnp.full((8,), segment)
    t_m = draw_timesteps(jax.random.key(data.draw(st.integers(0, 999))), each, num_segments)
    upper, lower = segment_edges(each, num_segments)
    t_n = short_step(t_m, skip, lower)
    num_jumps = segment + 1
    times = np.asarray(denoising_timesteps(t_m, t_n, jnp.int32(num_jumps), num_segments))
    assert times.shape == (num_segments + 2, 8)
    assert (times[0] == LAST_TIMESTEP).all()
    assert (np.diff(times, axis=0) <= 0).all()
    np.testing.assert_array_equal(times[num_jumps], t_m)
    assert (times[num_jumps + 1 :] == np.asarray(t_n)).all()
    assert (np.asarray(t_m) <= upper).all() and (times >= np.asarray(lower)).all()
    jumps = np.diff(times[: num_jumps + 1], axis=0)
    assert (jumps.max(axis=0) - jumps.min(axis=0) <= 1).all(), "the jumps to t_m are equal but for rounding"


@pytest.mark.parametrize("num_jumps", [1, 2, 5])
def test_only_the_jumps_that_are_needed_run(num_jumps):
    calls = []

    def counted_x0(z, t):
        jax.debug.callback(calls.append, t[0])
        return TEACHER.x0(z, t)

    @jax.jit
    def run(num_jumps):
        times = denoising_timesteps(T_M, T_N, num_jumps, 8)
        return multistep_denoising(counted_x0, SCHEDULE, NOISE, times, num_jumps)

    jax.block_until_ready(run(jnp.int32(num_jumps)))
    jax.effects_barrier()
    assert len(calls) == num_jumps + 1
