import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import segment_of
from hypothesis import given
from hypothesis import strategies as st

from mlcm_jax.distillation.segments import boundaries, draw_timesteps, segment_boundaries, short_step
from mlcm_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("strict_arrays")

segment_counts = st.integers(1, 999)
traced_edges = jax.jit(segment_boundaries)
traced_segment_of = jax.jit(segment_of)
traced_draw = jax.jit(draw_timesteps)


@pytest.mark.parametrize("num_segments", range(1, 9))
def test_edges_are_what_tcd_visits(num_segments):
    scheduler = diffusers.TCDScheduler(original_inference_steps=1000)
    scheduler.set_timesteps(num_segments)
    visited = [*scheduler.timesteps.tolist(), 0]
    assert boundaries(num_segments).tolist() == visited


@given(segment_counts)
def test_traced_edges_equal_the_table_and_fall(num_segments):
    table = boundaries(num_segments)
    upper, lower = traced_edges(jnp.arange(999), num_segments)
    np.testing.assert_array_equal(upper[:num_segments], table[:-1])
    np.testing.assert_array_equal(lower[:num_segments], table[1:])
    assert table[0] == 999 and table[-1] == 0 and (np.diff(table) < 0).all()


@given(segment_counts)
def test_each_timestep_is_in_one_segment(num_segments):
    t = jnp.arange(1000)
    segment = traced_segment_of(t, num_segments)
    upper, lower = traced_edges(segment, num_segments)
    assert int(segment.min()) == 0 and int(segment.max()) == num_segments - 1
    inside = (lower < t) & (t <= upper)
    assert bool(inside[1:].all()) and int(segment[0]) == num_segments - 1


@given(segment_counts, st.integers(0, 2**31 - 1), st.integers(1, 999))
def test_no_timestep_leaves_its_segment(num_segments, seed, skip):
    segment = jnp.arange(64) % num_segments
    t_m = traced_draw(jax.random.key(seed), segment, num_segments)
    upper, lower = traced_edges(segment, num_segments)
    t_n = short_step(t_m, skip, lower)
    assert bool(((lower < t_m) & (t_m <= upper)).all())
    assert bool(((lower <= t_n) & (t_n < t_m) & (t_n >= t_m - skip)).all())
    np.testing.assert_array_equal(segment_of(t_m, num_segments), segment)


def test_draws_reach_both_ends():
    drawn = draw_timesteps(jax.random.key(0), jnp.full((4096,), 3), 8)
    upper, lower = segment_boundaries(3, 8)
    assert int(drawn.max()) == int(upper) and int(drawn.min()) == int(lower) + 1


@pytest.mark.parametrize("num_segments", [0, -1, 1000])
def test_impossible_number_of_segments(num_segments):
    with pytest.raises(UserError, match=f"num_segments={num_segments}"):
        boundaries(num_segments)
