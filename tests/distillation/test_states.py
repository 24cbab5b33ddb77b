"""The sources of training states, with a teacher whose flow is known exactly."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import GaussianTeacher, segment_of

from mlcm_jax.config import base
from mlcm_jax.diffusion.parameterization import add_noise
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.diffusion.scheduler_config import LAST_TIMESTEP
from mlcm_jax.diffusion.solvers import ddim_step, dpmpp_2m_step
from mlcm_jax.distillation.segments import boundaries, segment_boundaries
from mlcm_jax.distillation.states import STATE_SOURCES, Draws, SourceContext, empty_buffer

pytestmark = pytest.mark.usefixtures("strict_arrays")

SCHEDULE = Schedule.from_config(
    {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
)
TEACHER = GaussianTeacher(SCHEDULE, mean=0.7, std=0.4)
STUDENT = GaussianTeacher(SCHEDULE, mean=-0.5, std=0.3)
LATENT_SHAPE = (3, 3, 2)
TOP = LAST_TIMESTEP
STREAMING = STATE_SOURCES["streaming"]


def source(step=0, **settings):
    config = base()
    config.update({"skip": 20, **settings})
    return SourceContext(SCHEDULE, config, TEACHER.x0, STUDENT.x0, jax.random.key(step), jax.random.key(step + 500))


def draws(trajectory_step, num_segments, seed=0, latents=None):
    noise = jax.random.normal(jax.random.key(1000 + seed), (len(trajectory_step), *LATENT_SHAPE))
    return Draws(jnp.asarray(trajectory_step, jnp.int32), jnp.int32(num_segments), noise, latents)


def check(states, segment, num_segments, skip=20, substeps=1):
    """The state lies in its segment, and the teacher's solver leads from z_m to z_n without leaving it."""
    z_m, t_m, z_n, t_n, boundary, _ = states
    np.testing.assert_array_equal(segment_of(t_m, num_segments), segment)
    np.testing.assert_array_equal(boundary, segment_boundaries(jnp.asarray(segment), num_segments)[1])
    np.testing.assert_array_equal(t_n, np.maximum(np.asarray(t_m) - skip, boundary))
    z = z_m
    for i in range(substeps):
        t, s = (t_m - (t_m - t_n) * j // substeps for j in (i, i + 1))
        z = ddim_step(SCHEDULE, z, TEACHER.x0(z, t), t, s)
    np.testing.assert_allclose(z_n, z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mds", "data", "student"])
@pytest.mark.parametrize(("timesteps", "skip", "substeps"), [("uniform", 20, 1), ("milestones", 1000, 3)])
def test_states_lie_in_their_segments_and_z_n_follows_the_teacher(name, timesteps, skip, substeps):
    num_segments = 4
    latents = jax.random.normal(jax.random.key(5), (8, *LATENT_SHAPE)) if name == "data" else None
    for step in range(4):
        segment = np.full(8, step) if name == "mds" else np.arange(8) % num_segments
        trajectory_step = segment if timesteps == "milestones" else segment + 1
        drawn = source(step, states=name, timesteps=timesteps, skip=skip, solver_steps=substeps)
        states, buffer = STATE_SOURCES[name].states(drawn, draws(trajectory_step, num_segments, step, latents), None)
        assert buffer is None
        check(states, segment, num_segments, skip, substeps)
        if timesteps == "milestones":
            upper, lower = segment_boundaries(jnp.asarray(segment), num_segments)
            np.testing.assert_array_equal(states.t_m, upper)
            np.testing.assert_array_equal(states.t_n, lower)


def test_data_states_are_the_noised_latents():
    latents = jax.random.normal(jax.random.key(5), (4, *LATENT_SHAPE))
    given = draws([1, 2, 3, 4], 4, latents=latents)
    states, _ = STATE_SOURCES["data"].states(source(states="data"), given, None)
    np.testing.assert_array_equal(states.z_m, add_noise(SCHEDULE, latents, given.noise, states.t_m))


def test_student_states_are_noised_samples_of_the_student():
    given = draws([4] * 256, 4)
    states, _ = STATE_SOURCES["student"].states(source(states="student", timesteps="milestones"), given, None)
    sample = (states.z_m - add_noise(SCHEDULE, jnp.zeros_like(given.noise), given.noise, states.t_m)) / jnp.sqrt(
        SCHEDULE.alphas_cumprod[states.t_m]
    )[:, None, None, None]
    drawn = jax.random.normal(jax.random.key(7), given.noise.shape)
    for t, s in itertools.pairwise(boundaries(4)):
        t, s = (jnp.full(256, u, jnp.int32) for u in (t, s))
        drawn = ddim_step(SCHEDULE, drawn, STUDENT.x0(drawn, t), t, s)
    np.testing.assert_allclose(sample.mean(), drawn.mean(), atol=0.02)
    np.testing.assert_allclose(sample.std(), drawn.std(), rtol=0.05)
    assert abs(float(jnp.corrcoef(sample.ravel(), given.noise.ravel())[0, 1])) < 0.1, "other noise than the sample's"


def test_student_samples_and_timesteps_have_random_numbers_of_their_own():
    given, asked = draws([2] * 4, 4), source(states="student")
    (states, _), (other, _) = (
        STATE_SOURCES["student"].states(dataclasses.replace(asked, sample_key=jax.random.key(k)), given, None)
        for k in (1, 2)
    )
    np.testing.assert_array_equal(states.t_m, other.t_m)
    assert float(jnp.abs(states.clean - other.clean).min()) > 0
    again, _ = STATE_SOURCES["student"].states(
        dataclasses.replace(asked, sample_key=jax.random.key(1), timestep_key=jax.random.key(9)), given, None
    )
    np.testing.assert_array_equal(states.clean, again.clean)
    assert (states.t_m != again.t_m).any()


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_a_streamed_trajectory_is_one_of_the_teachers(solver):
    """Noise first, then one state a segment, each one solver step from the one before."""
    num_segments, buffer = 4, empty_buffer(6, LATENT_SHAPE)
    before = None
    for step in range(num_segments + 1):
        given = draws([step] * 6, num_segments, step)
        states, buffer = jax.jit(
            lambda draws, buffer, step=step: STREAMING.states(source(step, trajectory_solver=solver), draws, buffer)
        )(given, buffer)
        check(states, np.full(6, max(step - 1, 0)), num_segments)
        if before is None:
            np.testing.assert_array_equal(states.z_m, given.noise)
            assert (np.asarray(states.t_m) == TOP).all()
        else:
            z, t, x0_prev, t_prev = before
            x0 = TEACHER.x0(z, t)
            ddim, second = ddim_step(SCHEDULE, z, x0, t, states.t_m), None
            if solver == "dpmpp_2m":
                second = dpmpp_2m_step(SCHEDULE, z, x0, x0_prev, t_prev, t, states.t_m)
            np.testing.assert_allclose(states.z_m, ddim if second is None else second, rtol=1e-4, atol=1e-4)
        t_prev, x0_prev = (states.t_m, states.z_m) if before is None else (before[1], TEACHER.x0(before[0], before[1]))
        before = states.z_m, states.t_m, x0_prev, t_prev


def test_examples_of_a_buffer_start_afresh_each_on_its_own():
    buffer = dataclasses.replace(
        empty_buffer(2, LATENT_SHAPE), z=jnp.full((2, *LATENT_SHAPE), 3.0), t=jnp.array([400, 400])
    )
    given = draws([0, 3], 4)
    states, _ = STREAMING.states(source(), given, buffer)
    np.testing.assert_array_equal(states.t_m, [TOP, 400])
    np.testing.assert_array_equal(states.z_m[0], given.noise[0])
    np.testing.assert_array_equal(states.z_m[1], 3.0)


@pytest.mark.parametrize(("substeps", "calls"), [(1, 1), (3, 3)])
def test_streaming_asks_the_teacher_once_an_example_and_substep(substeps, calls):
    times = []

    def counted(z, t):
        jax.debug.callback(times.append, t[0])
        return TEACHER.x0(z, t)

    asked = dataclasses.replace(source(solver_steps=substeps), teacher_x0=counted)
    jax.block_until_ready(
        jax.jit(lambda draws, buffer: STREAMING.states(asked, draws, buffer))(
            draws([2, 3], 4), empty_buffer(2, LATENT_SHAPE)
        )
    )
    jax.effects_barrier()
    assert len(times) == calls


def test_streamed_states_converge_to_the_exact_flow_when_segments_are_many():
    def error(num_segments):
        buffer, given = empty_buffer(4, LATENT_SHAPE), None
        run = jax.jit(
            lambda step, draws, buffer: STREAMING.states(
                dataclasses.replace(source(), timestep_key=jax.random.key(step)), draws, buffer
            )
        )
        for step in range(num_segments + 1):
            given = draws([step] * 4, num_segments)
            states, buffer = run(step, given, buffer)
        exact = TEACHER.flow(given.noise, jnp.full_like(states.t_m, TOP), states.t_m)
        return float(jnp.abs(states.z_m - exact).max())

    errors = [error(m) for m in (12, 24, 48)]
    assert errors[0] > 1e-3
    np.testing.assert_allclose(np.log2(errors[0] / errors[2]) / 2, 1.0, atol=0.35)


def test_at_milestones_a_trajectory_goes_from_boundary_to_boundary_on_the_teachers_substeps():
    """The noise is the first segment's state. Segments end where the next state lies: it is z_n, not one long step."""
    drawn = {"timesteps": "milestones", "skip": 1000, "solver_steps": 4}
    buffer = empty_buffer(2, LATENT_SHAPE)
    for step in range(4):
        states, buffer = STREAMING.states(source(**drawn), draws([step] * 2, 4, step), buffer)
        check(states, np.full(2, step), 4, 1000, 4)
        np.testing.assert_array_equal(states.t_m, boundaries(4)[step])
        single = ddim_step(SCHEDULE, states.z_m, TEACHER.x0(states.z_m, states.t_m), states.t_m, states.t_n)
        if step < 3:  # after the last one the trajectory is over
            np.testing.assert_array_equal(buffer.t, states.t_n)
            np.testing.assert_array_equal(buffer.z, states.z_n)
            assert float(jnp.abs(single - states.z_n).max()) > 1e-3


def test_at_milestones_mds_draws_the_states_of_a_streamed_trajectory():
    """With whole segments in one step both follow the same DDIM trajectory."""
    drawn, buffer, given = {"timesteps": "milestones", "skip": 1000}, empty_buffer(2, LATENT_SHAPE), draws([0, 0], 4)
    for step in range(4):
        at = given._replace(trajectory_step=jnp.full(2, step))
        streamed, buffer = STREAMING.states(source(**drawn), at, buffer)
        drawn_anew, _ = STATE_SOURCES["mds"].states(source(**drawn), at, None)
        for one, other in zip(streamed[:5], drawn_anew[:5], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
