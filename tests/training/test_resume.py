"""Which settings may differ when a run goes on, and what is said of the learning rate then."""

import json

import pytest
from etils import epath
from small_runs import settings

from mlcm_jax.errors import UserError
from mlcm_jax.training.resume import CONFIG_FILE, changed_schedule, check_resume, read_settings

STAGES = ({"start": 4, "num_segments": 2}, {"start": 6, "optim.learning_rate": 1e-4})


def run_in(folder, config, without=()):
    """A workdir that holds a run of these settings; without: dotted names that it was too old to have."""
    values = json.loads(config.to_json())
    for name in without:
        *outer, last = name.split(".")
        node = values
        for part in outer:
            node = node[part]
        del node[last]
    (folder / CONFIG_FILE).write_text(json.dumps(values))
    return epath.Path(folder)


def test_a_run_that_is_older_than_a_setting_goes_on_with_its_default(tmp_path):
    config = settings(stages=STAGES)
    workdir = run_in(
        tmp_path, config, without=("trajectory_solver", "optim.moment_dtype", "lora.start", "sample.steps")
    )
    check_resume(config, workdir)
    assert read_settings(workdir).optim.moment_dtype == "float32"
    assert read_settings(workdir).sample.steps == config.sample.steps
    config.optim.moment_dtype = "bfloat16"
    with pytest.raises(UserError, match=r"holds a run with other settings \(optim\.moment_dtype\)"):
        check_resume(config, workdir)


def test_a_folder_without_a_run_takes_any_settings(tmp_path):
    assert read_settings(epath.Path(tmp_path)) is None
    check_resume(settings(), epath.Path(tmp_path))
    assert changed_schedule(settings(), epath.Path(tmp_path), 0) == ""


def test_lengths_looks_and_mesh_may_change(tmp_path):
    workdir, config = run_in(tmp_path, settings()), settings(num_steps=99, log_every=3)
    config.mesh.fsdp, config.sample.teacher_steps = 4, 50
    check_resume(config, workdir)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ((STAGES[0] | {"num_segments": 1}, STAGES[1]), "stages.2.num_segments"),
        (STAGES[:1], "stages.3.optim.learning_rate, stages.3.start"),
        ((*STAGES, {"start": 8, "skip": 10}), "stages.4.skip, stages.4.start"),
    ],
)
def test_stages_are_compared_one_by_one(tmp_path, stages, expected):
    workdir = run_in(tmp_path, settings(stages=STAGES))
    with pytest.raises(UserError, match=rf"other settings \({expected}\)"):
        check_resume(settings(stages=stages), workdir)


def test_a_learning_rate_changes_only_on_purpose(tmp_path):
    workdir, config = run_in(tmp_path, settings(stages=STAGES)), settings(stages=STAGES)
    config.optim.learning_rate = 5e-4
    with pytest.raises(UserError, match=r"another optim\.learning_rate \(0\.001\): to go on with 0\.0005, add --new_"):
        check_resume(config, workdir)
    check_resume(config, workdir, new_learning_rate=True)
    config.stages = (STAGES[0], STAGES[1] | {"optim.learning_rate": 2e-5})
    check_resume(config, workdir, new_learning_rate=True)
    config.optim.b2 = 0.9
    with pytest.raises(UserError, match=r"other settings \(optim\.b2\)"):
        check_resume(config, workdir, new_learning_rate=True)


def test_what_another_length_does_to_a_schedule_is_said(tmp_path):
    config = settings(num_steps=100)
    config.optim.schedule = "linear"
    workdir = run_in(tmp_path, config)
    assert changed_schedule(config, workdir, 50) == ""
    config.num_steps = 200
    assert changed_schedule(config, workdir, 50) == (
        "; the learning rate is 0.00075 at step 51, where it was to be 0.0005: its linear schedule ends at step 200, "
        "not 100"
    )
    config.optim.schedule = "constant"
    assert changed_schedule(config, run_in(tmp_path, config.copy_and_resolve_references()), 50) == ""
    config.optim.learning_rate = 5e-4
    assert changed_schedule(config, workdir, 50) == "; the learning rate is 0.0005 at step 51, where it was to be 0.001"
