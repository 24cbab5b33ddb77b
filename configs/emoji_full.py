"""MLCM on the emoji teacher, a LoRA (MLCM / TLCM, arXiv 2406.05768): the shipped student.

    python launch/train.py --config=configs/emoji_full.py --workdir=runs/emoji_full

4 segments on streamed trajectories, where the teacher integrates to the segment boundary, with distribution matching
beside the consistency loss. The LoRA is shipped: examples/emoji/student. Variants: "trajectories" has consistency
alone; "two_segments" goes on from it with 2 segments, "across" also with the paper's last stage, consistency across
segments on the student's own samples. On this teacher these made the samples of 8 and 4 steps no better
(docs/results.md, "Further stages"). Not measured with this teacher: "reward", which goes on from "trajectories" with a
reward model, as an earlier student did that exploited it (docs/results.md, "Corrected claims"); and "gpu", without
matching, which sees 180 times as many captions, for one GPU. Each stage has a learning rate schedule of its own, so
these variants begin like "trajectories".
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
VARIANTS = {  # steps, stages, sampler
    "matching": (150, (), "lcm"),
    "trajectories": (200, (), "tcd"),
    "two_segments": (400, (TWO_SEGMENTS,), "tcd"),
    "across": (650, (TWO_SEGMENTS, ACROSS), "lcm"),
    "reward": (300, (REWARD,), "tcd"),
    "gpu": (4500, GPU_STAGES, "tcd"),
}


def get_config(variant: str = "matching") -> ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"configs/emoji_full.py has no variant {variant!r}: use {', '.join(VARIANTS)}.")
    config = emoji_config("lora")
    config.lora.rank, config.lora.alpha = 32, 32.0
    config.guidance_scale = GUIDANCE_SCALE
    config.num_steps, config.stages, config.sampler = VARIANTS[variant]
    config.optim.learning_rate = 1e-3
    config.ema_decay = 0.99
    if variant == "matching":
        config.optim.learning_rate = 4e-4
        config.distribution_matching.weight = 0.3
        config.distribution_matching.learning_rate, config.distribution_matching.updates = 5e-4, 5
    if variant == "gpu":
        config.batch_size, config.solver_steps = 128, 4
        config.optim.schedule, config.ema_decay = "constant", 0.998
        config.log_every, config.checkpoint_every, config.sample_every = 50, 1000, 4500
    return config
