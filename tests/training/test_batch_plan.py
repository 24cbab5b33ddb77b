"""What a run does at each step, as a pure function of its configuration: stages, places on trajectories, prompts."""

import collections
import importlib
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcm_jax.config import base
from mlcm_jax.data.prompts import shuffled
from mlcm_jax.errors import UserError
from mlcm_jax.training.batch_plan import batch_plan, guidance_scales, renews_teacher, takes_new_prompt
from mlcm_jax.training.checks import validate
from mlcm_jax.training.optimizer import stage_optimizer
from mlcm_jax.training.stages import read_stages, settings_after, stage_at


def run(**values):
    config = base()
    config.update({"num_segments": 4, "batch_size": 8, "num_steps": 100, **values})
    return config


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 24), st.sampled_from(["uniform", "milestones"]))
def test_streamed_rows_walk_whole_trajectories_and_batches_hold_every_place(num_segments, n, timesteps):
    stages = read_stages(run(num_segments=num_segments, batch_size=n, timesteps=timesteps))
    length = {"uniform": num_segments + 1, "milestones": num_segments}[timesteps]  # noise is a milestone
    rows = [batch_plan(stages, step) for step in range(4 * length)]
    for before, after in itertools.pairwise(rows):
        goes_on = after.trajectory_step == before.trajectory_step + 1
        assert (goes_on | (after.trajectory_step == 0)).all()
        np.testing.assert_array_equal(after.prompts[goes_on], before.prompts[goes_on])
        assert (after.prompts[~goes_on] != before.prompts[~goes_on]).all()
    assert (rows[0].trajectory_step == 0).all()
    for late in rows[length:]:
        counts = np.bincount(late.trajectory_step, minlength=length)
        assert counts.max() - counts.min() <= 1, "places are spread evenly over a batch"
    ends = sum((after.trajectory_step == 0).sum() for after in rows[length : 3 * length])
    assert ends == 2 * n, "n trajectories begin every M + 1 steps, or M"
    assert len({(j, p) for r in rows for j, p in zip(r.trajectory_step, r.prompts, strict=True)}) == len(rows) * n


@pytest.mark.parametrize("states", ["mds", "data", "student"])
@pytest.mark.parametrize(("timesteps", "expected"), [("uniform", [0, 18, 18, 18]), ("milestones", [18, 18, 18])])
def test_other_states_visit_every_segment_equally_and_every_prompt_once(states, timesteps, expected):
    stages = read_stages(run(states=states, num_segments=3, batch_size=6, timesteps=timesteps))
    rows = [batch_plan(stages, step) for step in range(9)]
    np.testing.assert_array_equal(np.bincount(np.concatenate([r.trajectory_step for r in rows])), expected)
    assert sorted(np.concatenate([r.prompts for r in rows])) == list(range(54))
    one_segment = all(len(set(r.trajectory_step)) == 1 for r in rows)
    assert one_segment == (states == "mds")


def test_stages_add_up_and_take_prompts_where_the_last_one_stopped():
    changes = ({"start": 10, "num_segments": 2}, {"start": 30, "states": "student", "optim.learning_rate": 1e-5})
    stages = read_stages(run(stages=changes))
    assert [(s.start, s.end, s.config.num_segments, s.config.states) for s in stages] == [
        (0, 10, 4, "streaming"),
        (10, 30, 2, "streaming"),
        (30, 100, 2, "student"),
    ]
    assert [stage_at(stages, step) for step in (0, 9, 10, 29, 30, 500)] == [0, 0, 1, 1, 2, 2]
    assert stages[0].program_key() == stages[1].program_key() != stages[2].program_key()
    seen = collections.Counter()
    for stage in stages:
        prompts = {int(p) for step in range(stage.start, stage.end) for p in batch_plan(stages, step).prompts}
        seen.update(prompts)
        assert len(prompts) > 0.8 * (max(prompts) - min(prompts) + 1), "hardly any position is left out"
    assert set(seen.values()) == {1}, "no stage repeats the prompts of another"
    assert (batch_plan(stages, 10).trajectory_step == 0).all(), "a new number of segments starts new trajectories"


def test_the_former_student_predicts_what_it_was_trained_to():
    sample = {"student_prediction_type": "sample"}
    changes = ({"start": 10, "num_segments": 2} | sample, {"start": 20, "skip": 5}, {"start": 30, "num_segments": 1})
    config = run(skip=5, stages=changes)
    stages = read_stages(config)
    assert [s.former_prediction_type for s in stages] == ["", "", "", "sample"]
    assert [step for step in range(100) if renews_teacher(stages, step)] == [0, 10, 30]
    assert stages[2].program_key() != stages[3].program_key(), "they differ in the teacher"
    found = [settings_after(config, steps).student_prediction_type for steps in (0, 10, 11, 100)]
    assert found == ["", "", "sample", "sample"]


def test_a_stage_with_another_learning_rate_has_a_schedule_of_its_own():
    """The optimizer's own updates: warm-up and cosine to 0 in 4 steps, then in 3 at a tenth; the stage between them
    changes nothing in the first schedule."""
    config = run(num_steps=7, stages=({"start": 2, "num_segments": 2}, {"start": 4, "optim.learning_rate": 1e-3}))
    config.optim.update({"learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 1, "clip_norm": 1e9})
    optimizer = stage_optimizer(read_stages(config))
    params = {"w": jnp.ones((2, 2))}
    state, sizes = optimizer.init(params), []
    for _ in range(7):
        updates, state = optimizer.update({"w": jnp.ones((2, 2))}, state, params)
        sizes.append(float(-updates["w"][0, 0]))
    expected = [0, 1e-2, 0.75e-2, 0.25e-2, 0, 1e-3, 0.5e-3]
    np.testing.assert_allclose(sizes, expected, rtol=1e-3, atol=1e-9)


RECIPES = {
    "emoji": ("full", "lora"),
    "emoji_full": ("matching", "trajectories", "two_segments", "across", "reward", "gpu"),
    "emoji_ablation": ("streaming", "adversarial"),
    "sdxl": ("full", "lora", "all"),
    "sd15": ("full", "lora", "all"),
}


@pytest.mark.parametrize("name, variant", [(name, v) for name, variants in RECIPES.items() for v in variants])
def test_every_stage_of_a_recipe_can_work(name, variant):
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    config.preference.reward_model = (
        config.preference.reward_model or "mps=FOLDER"
    )  # what sdxl.py:all leaves to the user
    for stage in read_stages(config):
        validate(stage.config)


WRONG = {
    "no start": ({"num_segments": 2}, 'needs a "start"'),
    "a start that is no step": ({"start": 0, "num_segments": 2}, "after 0"),
    "a setting that cannot change": ({"start": 5, "batch_size": 2}, "'batch_size'"),
    "a misspelt setting": ({"start": 5, "num_segmentz": 2}, "'num_segmentz'"),
    "a value of another type": ({"start": 5, "num_segments": "two"}, "num_segments"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_stage_is_answered_in_one_sentence(case):
    change, words = WRONG[case]
    with pytest.raises(UserError, match=words):
        read_stages(run(stages=(change,)))


def test_guidance_is_drawn_once_for_each_position_of_the_stream():
    config = run(guidance_scale=3.0, guidance_scale_max=9.0)
    scales = guidance_scales(config, np.arange(500))
    assert scales.min() > 3 and scales.max() < 9 and abs(scales.mean() - 6) < 0.3
    np.testing.assert_array_equal(guidance_scales(config, np.arange(7, 11)), scales[7:11])
    np.testing.assert_array_equal(guidance_scales(run(guidance_scale=3.0), np.arange(3)), np.float32([3, 3, 3]))


def test_a_stage_may_have_its_own_guidance_in_the_same_program():
    stages = read_stages(run(guidance_scale=3.0, stages=({"start": 5, "guidance_scale": 4.5},)))
    assert [set(batch_plan(stages, step).guidance_scale.tolist()) for step in (4, 5)] == [{3.0}, {4.5}]
    assert stages[0].program_key() == stages[1].program_key()


def test_every_walk_through_the_prompts_holds_each_once_in_another_order():
    def rows(positions, seed=4):
        return [place.row for place in shuffled(positions, 10, seed)]

    walks = [rows(range(10 * i, 10 * i + 10)) for i in range(3)]
    assert all(sorted(w) == list(range(10)) for w in walks) and walks[0] != walks[1] != walks[2]
    assert shuffled([25, 3], 10, seed=4) == [(walks[2][5], 2), (walks[0][3], 0)]
    assert rows(range(10), seed=5) != walks[0]


@pytest.mark.parametrize("states", ["streaming", "mds", "student"])
def test_sizes_take_turns_and_share_the_prompts(states):
    """Each size has the trajectories of a run of its own; all sizes together take each position of the prompts once."""
    sizes, n = ((8, 8), (8, 16), (16, 8)), 6
    config = run(states=states, num_steps=60, batch_size=n)
    config.buckets = sizes
    stages, (alone,) = read_stages(config), read_stages(run(states=states, num_steps=60, batch_size=n))
    taken = []
    for step in range(60):
        plan, single = batch_plan(stages, step), batch_plan((alone,), step // len(sizes))
        np.testing.assert_array_equal(plan.trajectory_step, single.trajectory_step)
        np.testing.assert_array_equal(plan.prompts, single.prompts * len(sizes) + step % len(sizes))
        taken += plan.prompts[takes_new_prompt(stages[0], plan)].tolist()
    assert len(set(taken)) == len(taken)
    assert {0, 1, 2, 3, 4, 5} <= set(taken)
