"""Distil a teacher: python launch/train.py --config=configs/emoji.py --workdir=runs/emoji.

Every setting of the configuration can be overridden, as in --config.num_steps=100; mlcm_jax/config.py explains them.
Run the same command again to go on where a run stopped. On several hosts run it on each of them: docs/jobs.md.
"""

from absl import flags
from ml_collections import config_flags

from mlcm_jax.cli import run_main
from mlcm_jax.parallel import distributed
from mlcm_jax.training.run import distill

CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, such as configs/emoji.py.")
WORKDIR = flags.DEFINE_string("workdir", "runs/emoji", "Folder for checkpoints, metrics, samples and the export.")
PLAN_ONLY = flags.DEFINE_bool("plan_only", False, "Stop after the plan has been printed.")
COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Stop when the steps of all stages are compiled.")
NEW_LEARNING_RATE = flags.DEFINE_bool(
    "new_learning_rate", False, "Let a run go on with other learning rates than it had: those of the command."
)
COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "host:port of process 0; TPU pods, Slurm and Kubernetes need none.",
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are, with coordinator_address.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on, with coordinator_address.")
HEARTBEAT_TIMEOUT = flags.DEFINE_float(
    "heartbeat_timeout", distributed.HEARTBEAT_TIMEOUT, "Seconds of silence after which a process counts as dead.", 1.0
)
PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "FIRST:STOP: trace the steps FIRST <= step < STOP into workdir/profile, for TensorBoard."
)
flags.mark_flag_as_required("config")


def main():
    processes = COORDINATOR_ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value
    with distributed.joined(*processes, heartbeat_timeout=HEARTBEAT_TIMEOUT.value):
        distill(
            CONFIG.value,
            WORKDIR.value,
            plan_only=PLAN_ONLY.value,
            compile_only=COMPILE_ONLY.value,
            new_learning_rate=NEW_LEARNING_RATE.value,
            profile_steps=PROFILE_STEPS.value,
        )


if __name__ == "__main__":
    run_main(main)
