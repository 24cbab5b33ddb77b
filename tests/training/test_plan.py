"""What a run says before it starts."""

import jax
import pytest
from small_runs import settings

from mlcm_jax.training import program
from mlcm_jax.training.program import build_program, make_train_step

STAGES = ({"start": 4, "num_segments": 2}, {"start": 6, "num_segments": 1})


@pytest.mark.parametrize(("num_steps", "expected"), [(9, [(0, 4), (4, 6), (6, 9)]), (5, [(0, 4), (4, 5)])])
def test_it_tells_the_stages_that_the_run_reaches(architecture, num_steps, expected):
    plan = build_program(settings(stages=STAGES, num_steps=num_steps), architecture, jax.devices()[:1]).plan
    assert [(stage.start, stage.end) for stage in plan.stages] == expected
    assert f"steps {expected[-1][0] + 1} to {num_steps}:" in str(plan)


def test_a_step_is_traced_once_to_be_counted_and_compiled(architecture, monkeypatch):
    traces = []

    def noted(*args):
        step = make_train_step(*args)
        return lambda *arrays: traces.append(None) or step(*arrays)

    monkeypatch.setattr(program, "make_train_step", noted)
    run = build_program(settings(stages=STAGES), architecture, jax.devices()[:1])
    run.stages[-1].step.lower(run.state, run.frozen, run.stages[-1].batch)
    assert len(traces) == 1, "and the stages, which differ in their segments alone, share it"
