"""What the trainings share: one update with a moving average."""

from collections.abc import Callable
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mlcm_jax import rng
from mlcm_jax.distillation.state import TrainState, create, update_ema
from mlcm_jax.training import loop
from mlcm_jax.training.checkpoint import Checkpoints
from mlcm_jax.training.flops import count_flops
from mlcm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from mlcm_jax.training.report import Known
from mlcm_jax.types import Params

# (params, batch, random key) -> loss and further metrics
LossFn = Callable[[Params, Any, jax.Array], tuple[Float[Array, ""], dict[str, jax.Array]]]


def start(params: Params, loss_fn: LossFn, config: ConfigDict):
    """The first state and the jit-ed update (state, batch) -> (state, metrics) that minimises ``loss_fn``."""
    optimizer = make_optimizer(config.optim, config.num_steps)

    @jax.jit
    def step(state: TrainState, batch):
        decay = jnp.minimum(config.ema_decay, (state.step + 1.0) / (state.step + 10.0))
        return update(state, batch, loss_fn, optimizer, seed=config.seed, ema_decay=decay)

    return create(params, optimizer, with_ema=True), step


def update(
    state: TrainState,
    batch: Any,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    ema_decay: Float[Array, ""],
    scale: float | Float[Array, ""] = 1.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of ``optimizer``; ``scale`` multiplies it: the learning rate, where the optimizer's own is 1."""
    key = rng.stream(seed, "loss", state.step)
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, key)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, jax.tree.map(lambda u: scale * u, updates))
    ema = update_ema(state.ema, params, ema_decay)
    return TrainState(state.step + 1, params, opt_state, ema), {"loss": loss, **aux}


def run(
    state: TrainState,
    step: loop.StepFn,
    batch: loop.BatchFn,
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    sample_fn: loop.SampleFn | None = None,
) -> TrainState:
    """Train to ``config.num_steps`` from the newest checkpoint of ``workdir``, else from ``state``."""
    folder = epath.Path(workdir)
    schedule = learning_rate_schedule(config.optim, config.num_steps)
    flops = count_flops(step, state, batch(0))
    known = Known(learning_rate=lambda number: schedule(number - 1), flops=lambda number: flops)
    with closing(Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints)) as checkpoints:
        restored = checkpoints.restore(state)
        start = state if restored is None else restored
        return loop.run(start, step, batch, config, folder, checkpoints, known=known, sample_fn=sample_fn)
