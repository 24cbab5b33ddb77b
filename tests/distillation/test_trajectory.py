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
from mlcm_jax.diffusion.solvers import ddim_step
from mlcm_jax.distillation.segments import LAST_TIMESTEP, draw_timesteps, segment_edges, short_step
from mlcm_jax.distillation.trajectory import denoising_timesteps, walk

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


@partial(jax.jit, static_argnames=("substeps", "second_order"))
def trajectory(times, num_jumps, substeps=1, second_order=False):
    return walk(TEACHER.x0, SCHEDULE, NOISE, times, num_jumps, substeps, second_order=second_order)


def states(num_jumps, substeps=1, *, second_order=False, t_n=T_N):
    num_jumps = jnp.int32(num_jumps)
    times = denoising_timesteps(T_M, t_n, num_jumps, 64, substeps)
    return trajectory(times, num_jumps, substeps, second_order)


@pytest.mark.parametrize(("second_order", "order"), [(False, 1.0), (True, 2.0)])
def test_z_m_converges_to_the_exact_flow_with_the_solvers_order(second_order, order):
    exact = TEACHER.flow(NOISE, jnp.full_like(T_M, LAST_TIMESTEP), T_M)
    errors = [np.abs(states(k, second_order=second_order)[0] - exact).max(axis=(1, 2, 3)) for k in (16, 32, 64)]
    assert (errors[0] > 10.0 ** -(order + 2)).all(), "too small to measure an order"
    orders = np.stack([np.log2(errors[0] / errors[1]), np.log2(errors[1] / errors[2])])
    # Down to t = 20 the last jump spans most of the log-SNR: 64 jumps are too few to see its second order.
    np.testing.assert_allclose(orders[:, : 3 if second_order else 4], order, atol=0.25)


def test_z_n_converges_to_the_exact_flow_from_z_m_with_the_substeps():
    t_n = jnp.maximum(T_M - 250, 0)
    errors = []
    for substeps in (4, 8, 16):
        z_m, z_n = states(3, substeps, t_n=t_n)
        errors.append(np.abs(z_n - TEACHER.flow(z_m, T_M, t_n)).max())
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 1.0, atol=0.25)


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
    substeps = data.draw(st.integers(1, 4))
    times = np.asarray(denoising_timesteps(t_m, t_n, jnp.int32(num_jumps), num_segments, substeps))
    assert times.shape == (num_segments + substeps + 1, 8)
    assert (times[0] == LAST_TIMESTEP).all()
    assert (np.diff(times, axis=0) <= 0).all()
    np.testing.assert_array_equal(times[num_jumps], t_m)
    assert (times[num_jumps + substeps :] == np.asarray(t_n)).all()
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
        return walk(counted_x0, SCHEDULE, NOISE, times, num_jumps)

    jax.block_until_ready(run(jnp.int32(num_jumps)))
    jax.effects_barrier()
    assert len(calls) == num_jumps + 1
