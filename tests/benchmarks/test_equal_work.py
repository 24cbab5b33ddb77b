"""benchmarks/equal_work.py: the number of steps whose work is nearest, with stages at the same parts of the run."""

import itertools
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.emoji_full import get_config
from mlcm_jax.errors import UserError
from mlcm_jax.training.stages import read_stages

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from equal_work import of_length, scaled_starts, steps_for, work


@st.composite
def runs(draw):
    """FLOPs of a step of each stage, their starts, the length of the run."""
    length = draw(st.integers(10, 2000))
    later = draw(st.sets(st.integers(1, length - 1), max_size=3))
    starts = [0, *sorted(later)]
    return draw(st.lists(st.floats(1.0, 10.0), min_size=len(starts), max_size=len(starts))), starts, length


@given(run=runs())
def test_a_run_as_long_as_it_is_has_its_own_work(run):
    flops, starts, length = run
    assert scaled_starts(starts, length, length) == starts
    found = steps_for(work(flops, starts, length), flops, starts, length)
    assert work(flops, scaled_starts(starts, length, found), found) == pytest.approx(work(flops, starts, length))


@given(run=runs(), times=st.floats(1.0, 30.0))
def test_no_other_number_of_steps_is_nearer(run, times):
    flops, starts, length = run
    target = times * work(flops, starts, length)
    found = steps_for(target, flops, starts, length)

    def error(n):
        return abs(work(flops, scaled_starts(starts, length, n), n) - target)

    longest = int(target / min(flops)) + 2
    assert error(found) == min(error(n) for n in range(1, longest) if has_all_stages(starts, length, n)) <= max(flops)
    for start, before in zip(scaled_starts(starts, length, found), starts, strict=True):
        assert start / found == pytest.approx(before / length, abs=0.5 / found + 1e-12)


def has_all_stages(starts, length, num_steps):
    return all(a < b for a, b in itertools.pairwise([*scaled_starts(starts, length, num_steps), num_steps]))


def test_work_by_hand():
    # 10 of 40 steps at 1 FLOP, then 30 at 3: 100 in all, 2.5 a step on average. 250 are 100 steps, 25 and 75.
    assert work([1.0, 3.0], [0, 10], 40) == 100.0
    assert steps_for(250.0, [1.0, 3.0], [0, 10], 40) == 100
    assert scaled_starts([0, 10], 40, 100) == [0, 25]


def test_a_method_of_twice_the_flops_takes_half_of_the_steps():
    assert steps_for(1000.0, [4.0], [0], 7) == 250 and steps_for(1000.0, [8.0], [0], 7) == 125


@pytest.mark.parametrize(("target", "stages"), [(3.0, [0, 1, 2]), (0.1, [0])])
def test_too_little_work_is_refused(target, stages):
    flops = [10e12] * len(stages)
    with pytest.raises(UserError, match=rf"{target:g} TFLOP .* too few for {len(stages)} stage.*: raise --tflop"):
        steps_for(target * 1e12, flops, stages, 3)


def test_a_configuration_of_another_length_has_the_same_stages():
    config = get_config()
    longer = of_length(config, 2 * config.num_steps)
    stages, scaled = read_stages(config), read_stages(longer)
    assert [(2 * s.start, 2 * s.end) for s in stages] == [(s.start, s.end) for s in scaled]
    assert [s.config.states for s in stages] == [s.config.states for s in scaled]
    assert config.num_steps == get_config().num_steps, "the configuration itself is as it was"
