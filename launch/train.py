"""Distil a teacher: python launch/train.py --config=configs/emoji.py --workdir=runs/emoji.

Every setting of the configuration can be overridden, as in --config.num_steps=100; mlcm_jax/config.py explains them.
Run the same command again to go on where a run stopped.
"""

from absl import flags
from ml_collections import config_flags

from mlcm_jax.cli import run_main
from mlcm_jax.train.run import distill

CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, such as configs/emoji.py.")
WORKDIR = flags.DEFINE_string("workdir", "runs/emoji", "Folder for checkpoints, metrics, samples and the export.")
PLAN_ONLY = flags.DEFINE_bool("plan_only", False, "Stop after the plan has been printed.")
COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Stop when the steps of all stages are compiled.")
flags.mark_flag_as_required("config")


def main():
    distill(CONFIG.value, WORKDIR.value, plan_only=PLAN_ONLY.value, compile_only=COMPILE_ONLY.value)


if __name__ == "__main__":
    run_main(main)
