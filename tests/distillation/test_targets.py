"""The jump to a segment's edge, and the loss of the function that distillation looks for."""

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
from mlcm_jax.distillation.segments import draw_timesteps, segment_edges, short_step
from mlcm_jax.distillation.targets import jump_to_edge

pytestmark = pytest.mark.usefixtures("strict_arrays")

SCHEDULE = Schedule.from_config(
    {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
)
TEACHER = GaussianTeacher(SCHEDULE, mean=-0.3, std=0.6)
NUM_SEGMENTS = 4
SHAPE = (4, 3, 3, 2)


def solution_x0(edge):
    """The x0 that the true solution from t to edge implies: the prediction of a student that has learned all."""

    def predict(z, t):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(SCHEDULE, t), alpha_sigma(SCHEDULE, edge)
        ratio = sigma_s / sigma_t
        return (TEACHER.flow(z, t, edge) - ratio * z) / (alpha_s - ratio * alpha_t)

    return predict


def states(seed, segment):
    """A segment's random points of the teacher's exact trajectories: z, t, lower edge."""
    times, noise = jax.random.split(jax.random.key(seed))
    each = jnp.full((SHAPE[0],), segment)
    t = draw_timesteps(times, each, NUM_SEGMENTS)
    z = TEACHER.flow(jax.random.normal(noise, SHAPE), jnp.full_like(t, 999), t)
    return z, t, segment_edges(each, NUM_SEGMENTS)[1]


@jax.jit
def consistency_loss(z, t_m, skip, edge):
    """The loss of the true solution with the teacher's DDIM step from t_m."""
    t_n = short_step(t_m, skip, edge)
    z_n = ddim_step(SCHEDULE, z, TEACHER.x0(z, t_m), t_m, t_n)
    jump = jump_to_edge(SCHEDULE, z, solution_x0(edge)(z, t_m), t_m, edge)
    # at t_n = edge the implied x0 is 0 / 0: no network says that, so the target is the boundary condition itself
    inside = jnp.maximum(t_n, edge + 1)
    target = jump_to_edge(SCHEDULE, z_n, solution_x0(edge)(z_n, inside), inside, edge)
    return l2(jump, jnp.where((t_n == edge)[:, None, None, None], z_n, target))


@settings(max_examples=20)
@given(st.integers(0, 999), st.integers(0, NUM_SEGMENTS - 1), st.floats(-1e6, 1e6))
def test_at_the_edge_the_jump_is_the_identity_to_the_bit(seed, segment, prediction):
    z, t, edge = states(seed, segment)
    t = jnp.where(jnp.arange(SHAPE[0]) % 2 == 0, edge, t)

    def predict(z, t):
        return jnp.full_like(z, prediction)

    jumped = np.asarray(jump_to_edge(SCHEDULE, z, predict(z, t), t, edge))
    np.testing.assert_array_equal(jumped[::2].view(np.uint32), np.asarray(z)[::2].view(np.uint32))


def test_at_the_edge_not_even_nan_gets_through():
    z, _, edge = states(0, 1)
    jumped = jump_to_edge(SCHEDULE, z, jnp.full_like(z, jnp.nan), edge, edge)
    np.testing.assert_array_equal(jumped, z)


@pytest.mark.parametrize("segment", range(NUM_SEGMENTS))
def test_the_true_solution_jumps_along_the_flow(segment):
    z, t, edge = states(1, segment)
    jumped = jump_to_edge(SCHEDULE, z, solution_x0(edge)(z, t), t, edge)
    np.testing.assert_allclose(jumped, TEACHER.flow(z, t, edge), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("segment", range(NUM_SEGMENTS))
def test_the_true_solution_has_no_loss_but_the_solvers_error(segment):
    z, _, edge = states(2, segment)
    upper = segment_edges(jnp.full((SHAPE[0],), segment), NUM_SEGMENTS)[0]
    t_m = upper - 40 * jnp.arange(SHAPE[0])
    z = TEACHER.flow(z, upper, t_m)
    # One DDIM step is wrong by O(skip^2), so the squared distance falls by 2^4 when skip is halved.
    coarse, fine = (np.asarray(consistency_loss(z, t_m, skip, edge)) for skip in (80, 40))
    assert (fine < 1e-3).all()
    order = np.log2(coarse / fine)
    np.testing.assert_allclose(order, 4.0, atol=1.0)


def test_a_wrong_function_has_a_loss():
    z, t, edge = states(3, 1)
    t_n = short_step(t, 20, edge)
    z_n = ddim_step(SCHEDULE, z, TEACHER.x0(z, t), t, t_n)

    def wrong(z, t):
        return 1.5 * TEACHER.x0(z, t)

    losses = l2(*(jump_to_edge(SCHEDULE, y, wrong(y, u), u, edge) for y, u in ((z, t), (z_n, t_n))))
    assert float(losses.max()) > 10 * float(consistency_loss(z, t, 20, edge).max())
