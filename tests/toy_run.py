"""A whole run of the toy denoiser, with stages, a moving average and a critic, that a process can be started for."""

import json
from contextlib import closing

import jax
import jax.numpy as jnp
from etils import epath
from small_runs import SCHEDULE, settings
from toy_denoiser import LATENT_SHAPE, toy_apply, toy_batch, toy_conditioning, toy_params

from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.losses.base import CriticShapes
from mlcm_jax.distillation.state import Frozen
from mlcm_jax.distillation.step import make_train_step
from mlcm_jax.training import loop
from mlcm_jax.training.batch_plan import batch_plan
from mlcm_jax.training.checkpoint import Checkpoints, latest_step
from mlcm_jax.training.initial_state import InitialState
from mlcm_jax.training.optimizer import stage_optimizer
from mlcm_jax.training.report import Known
from mlcm_jax.training.stages import read_stages, stage_at

BATCH_SIZE = 8


def run(workdir: str, num_steps: int) -> None:
    """Train, or go on; leaves the trained weights in weights.json."""
    folder = epath.Path(workdir)
    changes = ({"start": num_steps // 3, "num_segments": 2}, {"start": 2 * num_steps // 3, "states": "student"})
    config = settings(num_steps=num_steps, log_every=1, checkpoint_every=3, ema_decay=0.9, stages=changes)
    config.distribution_matching.weight = 0.5
    stages = read_stages(config)
    frozen = Frozen(toy_params(2), toy_conditioning(1, 4))
    shapes = CriticShapes(*jax.eval_shape(_examples, frozen.teacher))
    optimizer, contexts = stage_optimizer(stages), (DistillationContext(toy_apply, SCHEDULE, s.config) for s in stages)
    steps = [jax.jit(make_train_step(context, optimizer, LATENT_SHAPE)) for context in contexts]

    def batch(number):
        stage = stages[stage_at(stages, number)].config
        plan = batch_plan(stages, number).trajectory_step
        return stage_at(stages, number), toy_batch(BATCH_SIZE, number, plan, stage.num_segments)

    latest_step(folder / "checkpoints", set_aside=True)
    with closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        start = InitialState(stages, toy_apply, SCHEDULE, shapes, (LATENT_SHAPE,))(toy_params(1))
        state = checkpoints.restore(start)
        known = Known(learning_rate=lambda number: config.optim.learning_rate, flops=lambda number: 1.0)
        state = loop.run(
            start if state is None else state,
            lambda state, given: steps[given[0]](state, frozen, given[1]),
            batch,
            config,
            folder,
            checkpoints,
            known=known,
        )
    assert state.critics, "the run has a critic"
    (folder / "weights.json").write_text(json.dumps(jax.tree.map(lambda a: a.tolist(), state.trained)))


def _examples(teacher):
    return teacher, toy_conditioning(BATCH_SIZE, 1), jnp.zeros((BATCH_SIZE, *LATENT_SHAPE))
