"""What a run says before it starts."""

import jax
import pytest
from small_runs import settings

from mlcm_jax.training.program import build_program

STAGES = ({"start": 4, "num_segments": 2}, {"start": 6, "num_segments": 1})


@pytest.mark.parametrize(("num_steps", "expected"), [(9, [(0, 4), (4, 6), (6, 9)]), (5, [(0, 4), (4, 5)])])
def test_it_tells_the_stages_that_the_run_reaches(architecture, num_steps, expected):
    plan = build_program(settings(stages=STAGES, num_steps=num_steps), architecture, jax.devices()[:1]).plan
    assert [(stage.start, stage.end) for stage in plan.stages] == expected
    assert f"steps {expected[-1][0] + 1} to {num_steps}:" in str(plan)
