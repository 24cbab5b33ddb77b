"""The rows of docs/ablation.md: the parts of the method, one at a time, on the emoji teacher.

    python launch/train.py --config=configs/emoji_ablation.py:streaming --workdir=runs/streaming
    python benchmarks/ablation.py --latents=FILE --out=runs/ablation       # trains and measures all rows

The parts are those of MLCM / TLCM (arXiv 2406.05768, table 2); LCM (2310.04378) is the baseline. Each further loss is
added alone to the improved stage 2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.emoji import get_config as emoji_config
from mlcm_jax.errors import UserError

LATE = 0.6  # of a run: where a row's later settings begin

# What all rows change in configs/emoji.py:lora. A LoRA at this rate needs 150 steps where all weights need 700.
BASE = {
    "lora.rank": 32,
    "lora.alpha": 32.0,
    "optim.learning_rate": 1e-3,
    "optim.warmup_steps": 10,
    "ema_decay": 0.95,
    "checkpoint_every": 50,
    "keep_checkpoints": 1,
    # benchmarks/ablation.py measures with images of its own, so the run samples few.
    "sample.steps": (4,),
    "sample.teacher_steps": 4,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """What a row changes from the first step on, and in the last part of the run."""

    title: str
    first: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    late: Mapping[str, Any] = dataclasses.field(default_factory=dict)


RAW = {"states": "student", "target": "x0", "timesteps": "uniform", "skip": 20, "solver_steps": 1}
STAGE_2 = {"states": "student", "target": "x0", "solver_steps": 3}
ROWS = {
    "one_step": Row("one-step states", {"states": "student", "student_steps": 1}),
    "mds": Row("MDS", {"states": "mds"}),
    "streaming": Row("streaming"),
    "stage2_raw": Row("streaming, stage 2 raw", {}, RAW),
    "stage2": Row("streaming, stage 2 improved", {}, STAGE_2),
    "lpips": Row(
        "stage 2 + latent LPIPS",
        {"latent_lpips": "examples/emoji/latent_lpips"},
        STAGE_2 | {"distance": "latent_lpips"},
    ),
    "preference": Row("stage 2 + preference", {}, STAGE_2 | {"preference.weight": 300.0}),
    "matching": Row(
        "stage 2 + distribution matching",
        {"distribution_matching.learning_rate": 5e-4},
        STAGE_2 | {"distribution_matching.weight": 0.3},
    ),
    "adversarial": Row(
        "stage 2 + adversarial", {"adversarial.learning_rate": 1e-3}, STAGE_2 | {"adversarial.weight": 0.1}
    ),
    "lcm": Row(  # configs/emoji_lcm.py at the one guidance scale of the other rows
        "LCM",
        {
            "states": "data",
            "num_segments": 1,
            "timesteps": "uniform",
            "skip": 20,
            "solver_steps": 1,
            "target": "x0",
            "target_network": "ema",
            "distance": "pseudo_huber",
            "sampler": "lcm",
        },
    ),
}


def row_config(name: str, num_steps: int) -> ConfigDict:
    """The configuration of a row's run; raises UserError for a name that is no row."""
    if name not in ROWS:
        raise UserError(f"{name!r} is no row of the ablation: use one of {', '.join(ROWS)}.")
    row, config = ROWS[name], emoji_config("lora")
    config.update_from_flattened_dict(BASE | dict(row.first))
    config.num_steps = num_steps
    if row.late:
        config.stages = ({"start": max(1, round(LATE * num_steps)), **row.late},)
    return config


def get_config(variant: str = "streaming") -> ConfigDict:
    return row_config(variant, 700)
