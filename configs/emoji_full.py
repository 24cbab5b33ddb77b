"""All stages of the method on the emoji teacher, one LoRA through all of them (MLCM / TLCM, arXiv 2406.05768).

    python launch/train.py --config=configs/emoji_full.py --workdir=runs/emoji_full

Stages: 4, then 2 segments on streamed trajectories, where the teacher integrates to the segment boundary; then
consistency across segments on the student's own samples. Each stage has a learning rate schedule of its own, so a run
that ends with a stage (--config.num_steps=200) is the first part of the whole run. Its LoRA is shipped:
examples/emoji/student. It uses no reward model: an earlier student exploited one (docs/results.md, "Corrected claims").
The variants "reward" and "matching" add a reward model or distribution matching to the last stage; they have not been
measured with this teacher. "gpu" sees 50 times as many captions, for one GPU; it has not been run to its end.
Hardware and time: one CPU core, about 25 minutes. Expected figures: docs/results.md.
"""

from ml_collections import ConfigDict

from configs.emoji import get_config as emoji_config
from mlcm_jax.errors import UserError

GUIDANCE_SCALE = 1.5  # where the teacher's 25-step samples are nearest to the real images (examples/emoji/README.md)
LCM_STEPS_AT_EQUAL_WORK = 1100  # of configs/emoji_ablation.py:lcm; both take 67.6 TFLOP by --plan_only

# From step 400 on: consistency across segments.
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
    {"start": 500, "num_segments": 2, "solver_steps": 8, "optim.learning_rate": 8e-4},
    ACROSS | {"start": 1000},
    ACROSS | {"start": 3000, "optim.learning_rate": 2e-4},
)
VARIANTS = {  # what the last stage has in addition
    "all": {},
    "gpu": {},
    "reward": {"preference.weight": 100.0},
    "matching": {"distribution_matching.weight": 0.5},
}


def get_config(variant: str = "all") -> ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"configs/emoji_full.py has no variant {variant!r}: use {', '.join(VARIANTS)}.")
    config = emoji_config("lora")
    config.lora.rank, config.lora.alpha = 32, 32.0
    config.guidance_scale = GUIDANCE_SCALE
    config.num_steps = 650
    config.optim.learning_rate = 1e-3
    config.ema_decay = 0.99
    config.distribution_matching.learning_rate = 5e-4
    config.stages = (
        {"start": 200, "num_segments": 2, "solver_steps": 4, "optim.learning_rate": 8e-4},
        ACROSS | VARIANTS[variant],
    )
    if variant == "gpu":
        config.batch_size, config.num_steps, config.stages = 128, 4500, GPU_STAGES
        config.optim.schedule, config.ema_decay = "constant", 0.998
        config.solver_steps = 4
        config.log_every, config.checkpoint_every, config.sample_every = 50, 1000, 4500
    return config
