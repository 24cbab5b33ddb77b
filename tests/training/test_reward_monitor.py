"""A run whose scorer is exploited ends with the student from before; others go on."""

from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_runs import settings

from mlcm_jax.distillation.state import create
from mlcm_jax.errors import UserError
from mlcm_jax.training import loop
from mlcm_jax.training.checkpoint import Checkpoints, latest_step
from mlcm_jax.training.checks import validate
from mlcm_jax.training.metrics import read_metrics
from mlcm_jax.training.report import Known
from mlcm_jax.training.reward_monitor import RewardMonitor, stop_rule

NUM_STEPS, RATE = 60, 0.05
KNOWN = Known(learning_rate=lambda step: RATE, flops=lambda step: 1.0)


def exploiting_step(state, _):
    """Gradient ascent on a score that only grows; the guard's score is best at x = 1 and falls from there on."""

    def loss(params):
        return -params["x"][0]

    value, gradient = jax.value_and_grad(loss)(state.params)
    params = jax.tree.map(lambda p, g: p - RATE * g, state.params, gradient)
    metrics = {
        "loss": value,
        "preference_score": -value,
        "preference_held_out": 1 - jnp.square(state.params["x"][0] - 1),
    }
    return state.replace(step=state.step + 1, params=params), metrics


def train(workdir, *, allowed, num_steps=NUM_STEPS, **values):
    values = {"keep_checkpoints": 20} | values
    config = settings(num_steps=num_steps, log_every=1, checkpoint_every=5, **values)
    config.preference.stop_when_held_out_falls = allowed
    state = create({"x": jnp.zeros(1)}, optax.sgd(RATE))
    stop_fn = stop_rule(config, workdir / "metrics.jsonl")
    with closing(Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)) as checkpoints:
        restored = checkpoints.restore(state)
        state, step = (state if restored is None else restored), jax.jit(exploiting_step)
        return loop.run(state, step, lambda step: None, config, workdir, checkpoints, known=KNOWN, stop_fn=stop_fn)


def test_an_exploiting_run_goes_back(tmp_path, capfd):
    state = train(tmp_path, allowed=0.1)
    stopped = read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]
    assert 30 < stopped < NUM_STEPS
    assert (
        f"Stopped at step {stopped}: the held-out score fell by more than 0.1 below its best" in capfd.readouterr().out
    )
    kept = int(state.step)
    assert kept == latest_step(tmp_path / "checkpoints") and 15 <= kept < stopped
    np.testing.assert_allclose(state.params["x"], [RATE * kept], rtol=1e-5)


def test_a_resumed_run_stops_where_the_whole_one_does(tmp_path):
    train(tmp_path / "whole", allowed=0.1)
    train(tmp_path / "parts", allowed=0.1, num_steps=25)
    train(tmp_path / "parts", allowed=0.1)
    whole, parts = (read_metrics(tmp_path / name / "metrics.jsonl")[-1]["step"] for name in ("whole", "parts"))
    assert whole == parts


def test_without_a_limit_or_within_it_a_run_goes_on(tmp_path):
    assert stop_rule(settings(), tmp_path) is None
    assert int(train(tmp_path, allowed=100.0).step) == NUM_STEPS


def test_a_run_without_an_early_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint is left: lower config.checkpoint_every"):
        train(tmp_path, allowed=0.1, keep_checkpoints=1)


def test_scores_that_fall_together_are_no_exploitation(tmp_path):
    """Nor does a scattered guard stop a run, or steps without the term."""
    watch = RewardMonitor(0.1, tmp_path / "none.jsonl")
    noise = np.random.default_rng(0).normal(scale=0.1, size=100)
    for step in range(100):
        assert watch(step, {"loss": 1.0}) is None
        fall = -0.01 * step
        assert watch(step, {"preference_score": fall, "preference_held_out": fall}) is None
    watch = RewardMonitor(0.1, tmp_path / "none.jsonl")
    for step in range(100):
        assert watch(step, {"preference_score": 0.01 * step, "preference_held_out": 0.5 + noise[step]}) is None


def test_a_limit_needs_a_guard():
    config = settings(teacher="t", prompts="p")
    config.sample.prompts = "p"
    config.preference.update({"weight": 1.0, "reward_model": "clip=somewhere", "stop_when_held_out_falls": 0.02})
    with pytest.raises(UserError, match=r"stop_when_held_out_falls needs config.preference.held_out_reward_model"):
        validate(config)
