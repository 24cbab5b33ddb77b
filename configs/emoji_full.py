"""MLCM on the emoji teacher, a LoRA (MLCM / TLCM, arXiv 2406.05768): the shipped student.

    python launch/train.py --config=configs/emoji_full.py --workdir=runs/emoji_full

4 segments on streamed trajectories, where the teacher integrates to the segment boundary, with distribution matching
beside the consistency loss. The LoRA is shipped: examples/emoji/student. Variants: "trajectories" has consistency
alone; "two_segments" goes on from it with 2 segments, "across" also with the paper's last stage, consistency across
segments on the student's own samples; "reward" with a reward model. On this teacher none of these made the samples of
8 and 4 steps better (docs/results.md, "Further stages", "Other recipes"). Not measured: "gpu", without matching, which
sees 180 times as many captions, for one GPU. Each stage has a learning rate schedule of its own, so these variants
begin like "trajectories".
Hardware and time: one CPU core, 15 to 30 minutes, 3 to 9 of them to compile. Expected figures: docs/results.md.
"""

from ml_collections import ConfigDict

from configs.emoji import get_config as emoji_config
from mlcm_jax.errors import UserError

GUIDANCE_SCALE = 1.5  # where the teacher's 25-step samples are nearest to the real images (examples/emoji/README.md)
LCM_STEPS_AT_EQUAL_WORK = 600  # of configs/emoji_ablation.py:lcm; both take 36.9 TFLOP by --plan_only

TWO_SEGMENTS = {"start": 200, "num_segments": 2, "solver_steps": 4, "optim.learning_rate": 8e-4}
# Consistency across segments. With TCD's sampler this student is worse than with LCM's.
ACROSS = {
    "start": 400,
    "num_segments": 4,
    "states": "student",
    "solver_steps": 2,
    "target": "x0",
    "distance": "pseudo_huber",
    "optim.learning_rate": 6e-4,
}
# The recipe of one GPU: 128 captions a step. Rates are constant; the moving average takes the place of their fall.
GPU_STAGES = (
    {"start": 1000, "num_segments": 2, "solver_steps": 8, "optim.learning_rate": 8e-4},
    {"start": 3000, "optim.learning_rate": 2e-4},
)
REWARD = {"start": 200, "preference.weight": 100.0, "optim.learning_rate": 2e-4}
BASE = {
    "lora.rank": 32,
    "lora.alpha": 32.0,
    "guidance_scale": GUIDANCE_SCALE,
    "optim.learning_rate": 1e-3,
    "ema_decay": 0.99,
}
VARIANTS = {  # what each changes in BASE
    "matching": {
        "num_steps": 150,
        "sampler": "lcm",
        "optim.learning_rate": 4e-4,
        "distribution_matching.weight": 0.3,
        "distribution_matching.learning_rate": 5e-4,
        "distribution_matching.updates": 5,
    },
    "trajectories": {"num_steps": 200},
    "two_segments": {"num_steps": 400, "stages": (TWO_SEGMENTS,)},
    "across": {"num_steps": 650, "stages": (TWO_SEGMENTS, ACROSS), "sampler": "lcm"},
    "reward": {"num_steps": 300, "stages": (REWARD,)},
    "gpu": {
        "num_steps": 4500,
        "stages": GPU_STAGES,
        "batch_size": 128,
        "solver_steps": 4,
        "optim.schedule": "constant",
        "ema_decay": 0.998,
        "log_every": 50,
        "checkpoint_every": 1000,
        "sample_every": 4500,
    },
}


def get_config(variant: str = "matching") -> ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"configs/emoji_full.py has no variant {variant!r}: use {', '.join(VARIANTS)}.")
    config = emoji_config("lora")
    config.update_from_flattened_dict(BASE | VARIANTS[variant])
    return config
