"""MLCM on the emoji teacher, one LoRA through its stages (MLCM / TLCM, arXiv 2406.05768): the shipped student.

    python launch/train.py --config=configs/emoji_full.py --workdir=runs/emoji_full

Stages: 4, then 2 segments on streamed trajectories, where the teacher integrates to the segment boundary. Each stage
has a learning rate schedule of its own, so a run that ends with a stage (--config.num_steps=200) is the first part of
the whole run. Its LoRA is shipped: examples/emoji/student.
"across" adds the paper's last stage, consistency across segments on the student's own samples. On this teacher it made
the samples no better (docs/results.md, "Consistency across segments"): the shipped student does without it. "reward"
and "matching" add a reward model or distribution matching to that stage; they have not been measured with this teacher,
and an earlier student exploited its reward model (docs/results.md, "Corrected claims"). "gpu" sees 90 times as many
captions, for one GPU; it has not been run to its end.
Hardware and time: one CPU core, 5 to 15 minutes. Expected figures: docs/results.md.
"""

from ml_collections import ConfigDict

from configs.emoji import get_config as emoji_config
from mlcm_jax.errors import UserError

GUIDANCE_SCALE = 1.5  # where the teacher's 25-step samples are nearest to the real images (examples/emoji/README.md)
LCM_STEPS_AT_EQUAL_WORK = 557  # of configs/emoji_ablation.py:lcm; both take 34.2 TFLOP by --plan_only

# From step 400 to 650: consistency across segments. With TCD's sampler this student is worse than with LCM's.
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
VARIANTS = {  # a further stage; None: none
    "trajectories": None,
    "gpu": None,
    "across": ACROSS,
    "reward": ACROSS | {"preference.weight": 100.0},
    "matching": ACROSS | {"distribution_matching.weight": 0.5},
}


def get_config(variant: str = "trajectories") -> ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"configs/emoji_full.py has no variant {variant!r}: use {', '.join(VARIANTS)}.")
    config = emoji_config("lora")
    config.lora.rank, config.lora.alpha = 32, 32.0
    config.guidance_scale = GUIDANCE_SCALE
    config.num_steps = 400
    config.optim.learning_rate = 1e-3
    config.ema_decay = 0.99
    config.distribution_matching.learning_rate = 5e-4
    config.stages = ({"start": 200, "num_segments": 2, "solver_steps": 4, "optim.learning_rate": 8e-4},)
    if further := VARIANTS[variant]:
        config.num_steps, config.stages, config.sampler = 650, (*config.stages, further), "lcm"
    if variant == "gpu":
        config.batch_size, config.num_steps, config.stages = 128, 4500, GPU_STAGES
        config.optim.schedule, config.ema_decay = "constant", 0.998
        config.solver_steps = 4
        config.log_every, config.checkpoint_every, config.sample_every = 50, 1000, 4500
    return config
