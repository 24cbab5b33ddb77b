"""Settings and checkpoints from before a renaming go on working."""

import json
import logging

import flax.struct
import jax
import numpy as np
import optax
import pytest
from etils import epath
from small_runs import settings
from toy_denoiser import LATENT_SHAPE, toy_params, toy_state

from mlcm_jax.config import RENAMED, base
from mlcm_jax.distillation.state import Critic
from mlcm_jax.errors import UserError
from mlcm_jax.rules import get
from mlcm_jax.training.checkpoint import Checkpoints
from mlcm_jax.training.resume import CONFIG_FILE, check_resume
from mlcm_jax.training.stages import read_stages

VALUES = {
    "terms_min_timestep": 500,
    "consistency_weight": 0.25,
    "preference.scorer": "clip=A",
    "preference.guard": "clip=B",
    "preference.stop_when_guard_falls": 0.5,
}


@pytest.mark.parametrize("old", RENAMED)
def test_a_former_key_sets_the_present_one_and_is_named(old, caplog):
    config = base()
    *outer, last = old.split(".")
    with caplog.at_level(logging.WARNING, "absl"):
        (config[outer[0]] if outer else config)[last] = VALUES[old]
    assert get(config, RENAMED[old]) == VALUES[old]
    assert f"config.{old} is now config.{RENAMED[old]}" in caplog.text


def test_stages_take_former_keys_and_values():
    config = settings(target="edge", stages=({"start": 2, "terms_min_timestep": 999, "target": "x0"},))
    config.stages += ({"start": 4, "consistency_weight": 0.5, "target": "edge"},)
    stages = [stage.config for stage in read_stages(config)]
    assert [stage.losses_min_timestep for stage in stages] == [0, 999, 999]
    assert [stage.consistency.weight for stage in stages] == [1.0, 1.0, 0.5]
    assert [stage.target for stage in stages] == ["boundary", "x0", "boundary"]


def test_a_run_from_before_the_renaming_goes_on(tmp_path):
    """Its config.json has former names; the command may have them or the present ones."""
    change = {"start": 2, "terms_min_timestep": 999}
    now = settings(stages=(change,))
    now.preference.reward_model = "clip=A"
    before = json.loads(now.to_json())
    before["terms_min_timestep"], before["consistency_weight"] = before.pop("losses_min_timestep"), 1.0
    before["preference"]["scorer"] = before["preference"].pop("reward_model")
    before["stages"], before["target"] = [change], "edge"
    del before["consistency"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(before))
    check_resume(now, epath.Path(tmp_path))
    now.losses_min_timestep = 5
    with pytest.raises(UserError, match="losses_min_timestep"):
        check_resume(now, epath.Path(tmp_path))


@flax.struct.dataclass
class FormerState:
    """The train state under the names of its fields before the renaming."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    ema: dict | None
    pool: object
    rivals: dict


def test_a_checkpoint_from_before_the_renaming_is_read(tmp_path):
    optimizer = optax.adam(1e-3)
    critic = Critic(toy_params(3), optimizer.init(toy_params(3)))
    state = toy_state(toy_params(1), optimizer, 4, with_ema=True, critics={"distribution_matching": critic})
    former = FormerState(state.step, state.params, state.opt_state, state.ema, state.trajectory_buffer, state.critics)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(former, 1)
    restored = checkpoints.restore(jax.eval_shape(lambda: state))
    checkpoints.close()
    assert restored.trajectory_buffer.z.shape == (4, *LATENT_SHAPE)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
