"""The consistency function, and the loss of the one that distillation looks for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import GaussianTeacher
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcm_jax.diffusion.schedule import Schedule, alpha_sigma
from mlcm_jax.diffusion.solvers import ddim_step
from mlcm_jax.distillation.distances import l2
from mlcm_jax.distillation.segments import draw_timesteps, segment_boundaries, short_step
from mlcm_jax.distillation.targets import to_boundary

pytestmark = pytest.mark.usefixtures("strict_arrays")

SCHEDULE = Schedule.from_config(
    {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
)
TEACHER = GaussianTeacher(SCHEDULE, mean=-0.3, std=0.6)
NUM_SEGMENTS = 4
SHAPE = (4, 3, 3, 2)


def solution_x0(boundary):
    """The x0 that the true solution from t to boundary implies: the prediction of a student that has learned all."""

    def predict(z, t):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(SCHEDULE, t), alpha_sigma(SCHEDULE, boundary)
        ratio = sigma_s / sigma_t
        return (TEACHER.flow(z, t, boundary) - ratio * z) / (alpha_s - ratio * alpha_t)

    return predict


def states(seed, segment):
    """A segment's random points of the teacher's exact trajectories: z, t, lower boundary."""
    times, noise = jax.random.split(jax.random.key(seed))
    each = jnp.full((SHAPE[0],), segment)
    t = draw_timesteps(times, each, NUM_SEGMENTS)
    z = TEACHER.flow(jax.random.normal(noise, SHAPE), jnp.full_like(t, 999), t)
    return z, t, segment_boundaries(each, NUM_SEGMENTS)[1]


@jax.jit
def consistency_loss(z, t_m, skip, boundary):
    """The loss of the true solution with the teacher's DDIM step from t_m."""
    t_n = short_step(t_m, skip, boundary)
    z_n = ddim_step(SCHEDULE, z, TEACHER.x0(z, t_m), t_m, t_n)
    answer = to_boundary(SCHEDULE, z, solution_x0(boundary)(z, t_m), t_m, boundary)
    # at t_n = boundary the implied x0 is 0 / 0: no network says that, so the target is the boundary condition itself
    inside = jnp.maximum(t_n, boundary + 1)
    target = to_boundary(SCHEDULE, z_n, solution_x0(boundary)(z_n, inside), inside, boundary)
    return l2(answer, jnp.where((t_n == boundary)[:, None, None, None], z_n, target))


@settings(max_examples=20)
@given(st.integers(0, 999), st.integers(0, NUM_SEGMENTS - 1), st.floats(-1e6, 1e6))
def test_at_the_boundary_the_answer_is_the_identity_to_the_bit(seed, segment, prediction):
    z, t, boundary = states(seed, segment)
    t = jnp.where(jnp.arange(SHAPE[0]) % 2 == 0, boundary, t)

    def predict(z, t):
        return jnp.full_like(z, prediction)

    answer = np.asarray(to_boundary(SCHEDULE, z, predict(z, t), t, boundary))
    np.testing.assert_array_equal(answer[::2].view(np.uint32), np.asarray(z)[::2].view(np.uint32))


def test_at_the_boundary_not_even_nan_gets_through():
    z, _, boundary = states(0, 1)
    answer = to_boundary(SCHEDULE, z, jnp.full_like(z, jnp.nan), boundary, boundary)
    np.testing.assert_array_equal(answer, z)


@pytest.mark.parametrize("segment", range(NUM_SEGMENTS))
def test_the_true_solution_goes_along_the_flow(segment):
    z, t, boundary = states(1, segment)
    answer = to_boundary(SCHEDULE, z, solution_x0(boundary)(z, t), t, boundary)
    np.testing.assert_allclose(answer, TEACHER.flow(z, t, boundary), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("segment", range(NUM_SEGMENTS))
def test_the_true_solution_has_no_loss_but_the_solvers_error(segment):
    z, _, boundary = states(2, segment)
    upper = segment_boundaries(jnp.full((SHAPE[0],), segment), NUM_SEGMENTS)[0]
    t_m = upper - 40 * jnp.arange(SHAPE[0])
    z = TEACHER.flow(z, upper, t_m)
    # One DDIM step is wrong by O(skip^2), so the squared distance falls by 2^4 when skip is halved.
    coarse, fine = (np.asarray(consistency_loss(z, t_m, skip, boundary)) for skip in (80, 40))
    assert (fine < 1e-3).all()
    order = np.log2(coarse / fine)
    np.testing.assert_allclose(order, 4.0, atol=1.0)


def test_a_wrong_function_has_a_loss():
    z, t, boundary = states(3, 1)
    t_n = short_step(t, 20, boundary)
    z_n = ddim_step(SCHEDULE, z, TEACHER.x0(z, t), t, t_n)

    def wrong(z, t):
        return 1.5 * TEACHER.x0(z, t)

    losses = l2(*(to_boundary(SCHEDULE, y, wrong(y, u), u, boundary) for y, u in ((z, t), (z_n, t_n))))
    assert float(losses.max()) > 10 * float(consistency_loss(z, t, 20, boundary).max())
