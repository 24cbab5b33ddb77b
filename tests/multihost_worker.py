"""One process of a run of a toy network, by the project's own start, loop and checkpoints:

python tests/multihost_worker.py WORKDIR NUM_STEPS FSDP [HOST:PORT PROCESSES NUMBER]
"""

import json
import sys
from contextlib import closing

import jax
import numpy as np
from etils import epath
from programs import HEARTBEAT_TIMEOUT
from toy_denoiser import LATENT_SHAPE, toy_apply, toy_batch, toy_conditioning, toy_params, toy_state

from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.state import Frozen
from mlcm_jax.distillation.step import make_train_step
from mlcm_jax.errors import UserError
from mlcm_jax.parallel import distributed, sharding
from mlcm_jax.training import loop
from mlcm_jax.training.batch_plan import batch_plan
from mlcm_jax.training.checkpoint import Checkpoints
from mlcm_jax.training.optimizer import make_optimizer
from mlcm_jax.training.report import Known
from mlcm_jax.training.stages import read_stages

BATCH_SIZE = 8
RULES = ((r"(^|/)a$", (None, "fsdp")), (r"(^|/)b$", ("fsdp", None)))
FAILS = 999_999  # a number of steps with which process 1 finds something wrong


def train(workdir: epath.Path, num_steps: int, fsdp: int, devices=None) -> None:
    """To the last step, from the newest checkpoint of ``workdir``; leaves weights.json."""
    from small_runs import SCHEDULE, settings  # makes arrays, which must wait until the processes have met

    config = settings(batch_size=BATCH_SIZE, num_steps=num_steps, log_every=1, checkpoint_every=2, ema_decay=0.9)
    config.mesh.fsdp = fsdp
    mesh, stages = sharding.make_mesh(config.mesh, devices), read_stages(config)
    rows, replicated = sharding.batch_sharding(mesh), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    optimizer = make_optimizer(config.optim, num_steps)
    step = make_train_step(DistillationContext(toy_apply, SCHEDULE, config), optimizer, LATENT_SHAPE)

    def start():
        return toy_state(toy_params(1), optimizer, BATCH_SIZE, with_ema=True)

    placements = sharding.param_shardings(jax.eval_shape(start), mesh, RULES, min_size=1)
    placements = placements.replace(trajectory_buffer=jax.tree.map(lambda _: rows, placements.trajectory_buffer))
    frozen = jax.tree.map(
        lambda a: sharding.from_equal_values(replicated, a), Frozen(toy_params(2), toy_conditioning(1, 4))
    )

    def batch(number):
        """This process's rows alone reach its devices."""
        whole = toy_batch(BATCH_SIZE, number, batch_plan(stages, number).trajectory_step, config.num_segments)
        mine = sharding.local_rows(rows, BATCH_SIZE)
        return jax.tree.map(
            lambda a: (
                sharding.from_local_rows(rows, np.asarray(a)[mine])
                if np.shape(a)[:1] == (BATCH_SIZE,)  # the seed has two words
                else sharding.from_equal_values(replicated, a)
            ),
            whole,
        )

    if num_steps == FAILS and jax.process_index() == 1:
        raise UserError("A file is missing here.")
    abstract = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), jax.eval_shape(start), placements
    )
    with closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        state = checkpoints.restore(abstract)
        if state is None:
            state = jax.jit(start, out_shardings=placements)()
        step = jax.jit(step, donate_argnums=0, out_shardings=(placements, replicated))
        known = Known(learning_rate=lambda number: config.optim.learning_rate, flops=lambda number: 1.0)
        state = loop.run(state, lambda s, b: step(s, frozen, b), batch, config, workdir, checkpoints, known=known)
    weights = {name: distributed.host_array(values).tolist() for name, values in state.trained.items()}
    if distributed.is_first():
        (workdir / "weights.json").write_text(json.dumps(weights))


def main():
    workdir, num_steps, fsdp, *processes = sys.argv[1:]
    address, count, number = processes or (None, None, None)
    with distributed.joined(address, count and int(count), number and int(number), heartbeat_timeout=HEARTBEAT_TIMEOUT):
        train(epath.Path(workdir), int(num_steps), int(fsdp))


if __name__ == "__main__":
    main()
