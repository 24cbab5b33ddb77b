"""All stages of the method on the emoji teacher, one LoRA through all of them (MLCM / TLCM, arXiv 2406.05768).

    python launch/train.py --config=configs/emoji_full.py --workdir=runs/emoji_full
    python launch/train.py --config=configs/emoji_full.py:huber --workdir=runs/huber

8, 4, then 2 segments on streamed trajectories; consistency across segments on the student's own samples; the same in
pseudo-Huber distance, beside a judge of the pictures, which at last changes the answers for pure noise alone. Variants
show what that is worth: "direct" begins with the judge where trajectories end, "every_state" has no last stage for pure
noise, "huber" no judge, "matching" distribution matching in its place, "both" the two of them. It resumes inside any
stage. Its LoRA is shipped: examples/emoji/student. What was measured: README.md, "After all stages", and
docs/ablation.md. Hardware and time: one CPU core, some 95 minutes.
"""

from ml_collections import ConfigDict

from configs.emoji import get_config as emoji_config
from mlcm_jax.errors import UserError

# Consistency across segments costs guidance: with 3 here, 8 steps end further from the teacher than 2 do.
ACROSS = {
    "start": 1500,
    "num_segments": 4,
    "states": "student",
    "solver_steps": 2,
    "target": "x0",
    "guidance_scale": 4.5,
}
HUBER = {"start": 2200, "distance": "pseudo_huber", "guidance_scale": 4.75, "optim.learning_rate": 6e-4}
JUDGED = HUBER | {"preference.weight": 400.0}
# What a judge adds in one jump adds up over jumps; a first jump can take more of it.
NOISE = {"start": 2550, "terms_min_timestep": 999, "preference.weight": 2500.0, "optim.learning_rate": 8e-4}
MATCHED = {"distribution_matching.weight": 0.8}
VARIANTS = {  # num_steps and the stages after those on trajectories
    "all": (2890, (ACROSS, JUDGED, NOISE)),
    "direct": (2190, (ACROSS | JUDGED | {"start": 1500}, NOISE | {"start": 1850})),
    "every_state": (2650, (ACROSS, JUDGED)),
    "huber": (2650, (ACROSS, HUBER)),
    "matching": (2650, (ACROSS, HUBER | MATCHED)),
    "both": (2650, (ACROSS, JUDGED | MATCHED)),
}


def get_config(variant: str = "all") -> ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"configs/emoji_full.py has no variant {variant!r}: use {', '.join(VARIANTS)}.")
    config = emoji_config("lora")
    config.lora.rank, config.lora.alpha = 32, 32.0
    config.guidance_scale = 3.0  # where the teacher is at its best (its model card)
    config.num_segments = 8
    config.solver_steps = 1
    config.num_steps, later_stages = VARIANTS[variant]
    config.optim.learning_rate = 1e-3  # 3e-3 was worse after 150 steps
    config.ema_decay = 0.99
    config.stages = (
        {"start": 400, "num_segments": 4, "solver_steps": 2},
        {"start": 1200, "num_segments": 2, "solver_steps": 4},
        *later_stages,
    )
    config.distribution_matching.learning_rate = 5e-4  # of the variants that have it
    config.checkpoint_every = 100
    config.sample_every = 500
    return config
