"""Checkpoints: whole states on other meshes than they were saved from, and the trained parameters alone."""

import jax
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import SingleDeviceSharding
from multihost_worker import train
from programs import losses

from mlcm_jax.distillation import state as train_state
from mlcm_jax.errors import UserError
from mlcm_jax.hub.tensor_reader import read_json
from mlcm_jax.training.checkpoint import Checkpoints, latest_step, read_trained

PARAMS = {"a": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4)}, "b": np.ones(3, np.float32)}


def test_a_run_goes_on_with_fewer_devices_and_the_same_numbers(tmp_path):
    moving, still = epath.Path(tmp_path / "moving"), epath.Path(tmp_path / "still")
    for num_steps, (devices, fsdp) in enumerate([(8, 4), (4, 4), (2, 1), (1, 1)], 1):
        train(moving, 2 * num_steps, fsdp, jax.devices()[:devices])
    train(still, 8, 1, jax.devices()[:1])
    assert [step for step, *_ in losses(moving)] == list(range(1, 9))
    np.testing.assert_allclose(losses(moving), losses(still), rtol=1e-4)
    ours, theirs = (read_json(run / "weights.json") for run in (moving, still))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5)


@pytest.mark.parametrize("with_ema", [True, False])
def test_the_trained_parameters_are_read_alone(tmp_path, with_ema, monkeypatch):
    """The moving average where one is kept, on the given device, without the optimizer's state."""
    state = train_state.create(PARAMS, optax.adam(1e-3), with_ema=with_ema)
    if state.ema is not None:
        state = state.replace(ema=jax.tree.map(lambda a: a + 1, state.ema))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (3, 5):
        checkpoints.save(state, step)
    checkpoints.close()
    assert latest_step(tmp_path / "checkpoints") == 5
    device = jax.devices()[3]
    before = sum(a.nbytes for a in jax.live_arrays())
    newest = read_trained(tmp_path / "checkpoints", SingleDeviceSharding(device))
    assert newest is not None
    steps, trained = newest
    assert steps == 5
    size = sum(a.nbytes for a in jax.tree.leaves(PARAMS))
    assert sum(a.nbytes for a in jax.live_arrays()) - before <= size
    jax.tree.map(np.testing.assert_array_equal, trained, state.trained)
    assert {leaf.device for leaf in jax.tree.leaves(trained)} == {device}


def test_there_is_nothing_to_read_before_the_first_checkpoint(tmp_path):
    place = SingleDeviceSharding(jax.devices()[0])
    assert latest_step(tmp_path / "absent") is None and read_trained(tmp_path / "absent", place) is None
    (tmp_path / "12.orbax-checkpoint-tmp").mkdir()  # one that a kill cut short
    assert latest_step(tmp_path) is None


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(train_state.create(PARAMS, optax.sgd(1.0)), 1)
    other = jax.eval_shape(lambda: train_state.create({"a": {"kernel": PARAMS["b"]}}, optax.sgd(1.0)))
    with pytest.raises(UserError, match="does not fit this configuration"):
        checkpoints.restore(other)
    checkpoints.close()
