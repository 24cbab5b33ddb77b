"""Few-step methods on the emoji teacher at equal work: one table, from which configs/sdxl.py has its variants, too.

    python launch/train.py --config=configs/methods.py:lcm --workdir=runs/lcm --config.latents=FILE

All train at one guidance scale for 100 TFLOP, by the counter of --plan_only; all but lightning_full a LoRA of rank 32.
docs/methods.md says what each method is and where it deviates from its paper. The states of "data" need a file of
latents:

    python launch/encode.py --model=examples/emoji/teacher --prompts=examples/emoji/prompts/train.txt \
        --guidance_scale=1.5 --out=runs/emoji_latents.safetensors

Hardware and time: CPU cores; about 40 minutes on one, of any method.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.emoji_full import get_config as emoji_full_config
from mlcm_jax.config import base
from mlcm_jax.errors import UserError

# What a method sets, or has as in base(): nothing of MLCM's settings for a teacher is left.
OF_METHODS = (
    "num_segments",
    "states",
    "noise_offset",
    "trajectory_solver",
    "timesteps",
    "grid",
    "pure_noise",
    "skip",
    "skip_end",
    "solver_steps",
    "target_solver",
    "teacher_network",
    "target_noise",
    "target",
    "target_network",
    "distance",
    "sampler",
)


@dataclasses.dataclass(frozen=True)
class Method:
    """emoji_steps: of 100 TFLOP on the emoji teacher. sdxl_steps: the paper's, or as for MLCM. first: what it sets
    from the first step on. later: from which share of the run on what else. emoji, sdxl: for one of the teachers."""

    emoji_steps: int
    sdxl_steps: int
    first: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    later: tuple[tuple[float, Mapping[str, Any]], ...] = ()
    emoji: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sdxl: Mapping[str, Any] = dataclasses.field(default_factory=dict)


RATE = "optim.learning_rate, of the first"  # of a later stage, as a share of the first stage's

# Segments end where the student is taken, and the distance is that of clean latents.
TO_BOUNDARY = {"num_segments": 8, "target": "boundary", "distance": "x0_norm"}
FEWER_SEGMENTS = ((0.25, {"num_segments": 4}), (0.5, {"num_segments": 2}))
ANNEALED = {"skip": 16, "skip_end": 1}  # a teacher of 64 steps at first, and of a step each timestep in the end

PCM = {
    "states": "data",
    "num_segments": 4,
    "skip": 25,  # a grid of 40 timesteps
    "distance": "pseudo_huber",
    "adversarial_consistency.weight": 0.1,
}

# The weight of the adversarial loss rises and that of the squared error falls with fewer segments; a first guess.
TSCD = (
    (0.2, {"num_segments": 4}),
    (0.4, {"num_segments": 2, "consistency.weight": 0.75, "adversarial_consistency.weight": 0.05}),
    (0.6, {"num_segments": 1, "consistency.weight": 0.5, "adversarial_consistency.weight": 0.1}),
)
ONE_STEP = {  # from pure noise alone, as one sampling step starts
    "states": "streaming",
    "timesteps": "milestones",
    "noise_offset": 0.0,
    "target": "boundary",
    "consistency.weight": 1.0,
    "adversarial_consistency.weight": 0.0,
    "distribution_matching.weight": 1.0,
}
HYPER_SD = {
    "states": "data",
    "num_segments": 8,
    "target": "within_segment",
    "target_network": "ema",
    "ema_decay": 0.95,
    "noise_offset": 0.05,
}
HYPER_SD_EMOJI = {"adversarial_consistency.learning_rate": 1e-3, "distribution_matching.learning_rate": 5e-4}
HYPER_SD_SDXL = {"guidance_scale": 7.0, "guidance_scale_max": 8.0, "optim.learning_rate": 1e-6}

# No regression. The student is trained on its own states at 999, 749, 499 and 249, where LCMScheduler asks it.
DMD2 = {"num_segments": 4, "timesteps": "milestones", "consistency.weight": 0.0, "sampler": "lcm"}

# SDXL-Lightning's stages: 128 steps of the teacher to 32 by the squared difference, then with a discriminator alone, at
# each number of steps conditional first and then relaxed. The student of the number before is the teacher.
LIGHTNING = {
    "num_segments": 32,
    "timesteps": "milestones",
    "skip": 1000,
    "solver_steps": 4,
    "optim.b1": 0.0,
    "optim.b2": 0.99,
}
RELAXED = {"progressive_adversarial.relaxed": True}
CONDITIONAL = {
    "progressive_adversarial.relaxed": False,
    "progressive_adversarial.weight": 1.0,
    "consistency.weight": 0.0,
    "teacher_network": "previous",
}
FEWER_STEPS = (
    (0.3, RELAXED),
    (0.4, CONDITIONAL | {"num_segments": 4, "solver_steps": 2}),
    (0.5, RELAXED),
    (0.6, CONDITIONAL | {"num_segments": 2}),
    (0.7, RELAXED),
)
LIGHTNING_LORA = (
    (0.2, CONDITIONAL | {"num_segments": 8, RATE: 0.1}),
    *FEWER_STEPS,
    (0.8, CONDITIONAL | {"num_segments": 1}),
    (0.9, RELAXED),
)
# Of all weights, the student of one step turns to x0, by the squared difference again.
TO_X0 = {
    "num_segments": 1,
    "student_prediction_type": "sample",
    "progressive_adversarial.relaxed": False,
    "progressive_adversarial.weight": 0.0,
    "consistency.weight": 1.0,
}
LIGHTNING_FULL = (
    (0.2, CONDITIONAL | {"num_segments": 8, RATE: 0.05}),
    *FEWER_STEPS,
    (0.8, TO_X0 | {RATE: 1.0}),
    (0.88, CONDITIONAL | {RATE: 0.05}),
    (0.94, RELAXED),
)
OF_IMAGES = {"states": "data", "pure_noise": True}
LIGHTNING_SDXL = {"optim.learning_rate": 1e-5, "progressive_adversarial.learning_rate": 1e-6, "batch_size": 512}


def _lightning(emoji_steps: int, first, later, emoji: Mapping[str, Any] | None = None) -> Method:
    emoji = {"progressive_adversarial.learning_rate": 1e-4} | dict(emoji or {})
    return Method(emoji_steps, 12_000, LIGHTNING | first, later, emoji, LIGHTNING_SDXL)


METHODS = {
    "mlcm": Method(1168, 14_000),  # as in configs/emoji_full.py:two_segments and configs/sdxl.py:lora
    "lcm": Method(
        1627,
        12_000,
        {
            "states": "data",
            "num_segments": 1,
            "target": "x0",
            "target_network": "ema",
            "ema_decay": 0.95,
            "distance": "pseudo_huber",
            "sampler": "lcm",
        },
    ),
    "mcm": Method(
        1627, 12_000, TO_BOUNDARY | ANNEALED | {"states": "data", "target_solver": "addim_data"}, FEWER_SEGMENTS
    ),
    # Not "streaming": there every trajectory is trained on at t = 999, where a step of one timestep says nothing, and a
    # distance that is not squared does not shrink with it: the student drifts away in 1 and 2 steps.
    "mcm_data_free": Method(
        924, 12_000, TO_BOUNDARY | ANNEALED | {"states": "mds", "target_solver": "addim"}, FEWER_SEGMENTS
    ),
    "tract": Method(
        1719,
        12_000,
        {
            "states": "data",
            "timesteps": "grid",
            "grid": 64,
            "num_segments": 8,
            "target_network": "ema",
            "ema_decay": 0.95,
            "distance": "x0_snr",
        },
        (
            (0.4, {"num_segments": 2, "grid": 8, "teacher_network": "previous"}),
            (0.7, {"num_segments": 1, "grid": 2}),
        ),
    ),
    "pcm": Method(
        1085,
        20_000,
        PCM,
        emoji={"adversarial_consistency.learning_rate": 1e-3},  # as of the LoRA's own rate, for a short run
        sdxl={"guidance_scale": 7.0, "guidance_scale_max": 8.0, "optim.learning_rate": 2e-6},
    ),
    "pcm_no_cfg": Method(
        1206,
        20_000,
        PCM | {"guidance_scale": 1.0, "empty_prompts": 0.1},
        emoji={"adversarial_consistency.learning_rate": 1e-3},
        sdxl={"optim.learning_rate": 2e-6},
    ),
    "scott": Method(
        709,
        40_000,
        {
            "states": "data",
            "num_segments": 1,
            "skip": 24,
            "solver_steps": 3,
            "target_solver": "er_sde",
            "target_noise": 0.5,  # in the middle of the range: sources disagree
            "target": "x0",
            "target_network": "ema",
            "ema_decay": 0.95,
            "distance": "pseudo_huber",
            "adversarial.weight": 0.4,
            "adversarial.features": "decoder",
            "sampler": "lcm",
        },
        emoji={"adversarial.learning_rate": 1e-3},
    ),
    "tscd": Method(1162, 12_000, HYPER_SD, (*TSCD, (0.8, ONE_STEP)), HYPER_SD_EMOJI, HYPER_SD_SDXL),
    "tscd_reward": Method(
        1169,
        12_000,
        HYPER_SD,
        (*TSCD, (0.8, {"preference.weight": 1.0}), (0.9, ONE_STEP | {"preference.weight": 0.0})),
        HYPER_SD_EMOJI | {"preference.weight": 0.0},
        HYPER_SD_SDXL | {"preference.target": 2.0},  # of ImageReward
    ),
    "dmd2": Method(
        439,
        20_000,
        DMD2 | {"states": "simulation", "distribution_matching.weight": 1.0, "distribution_matching.updates": 5},
        emoji={"optim.learning_rate": 2e-4, "distribution_matching.learning_rate": 5e-4},
        sdxl={"optim.learning_rate": 5e-7, "distribution_matching.learning_rate": 5e-7, "batch_size": 128},
    ),
    "dmd2_data": Method(
        298,
        20_000,
        DMD2
        | {
            "states": "simulation_data",
            "distribution_matching_gan.weight": 1.0,
            "distribution_matching_gan.updates": 5,
        },
        emoji={"optim.learning_rate": 2e-4, "distribution_matching_gan.learning_rate": 5e-4},
        sdxl={"optim.learning_rate": 5e-7, "distribution_matching_gan.learning_rate": 5e-7, "batch_size": 128},
    ),
    "lightning": _lightning(834, OF_IMAGES, LIGHTNING_LORA),
    "lightning_full": _lightning(950, OF_IMAGES | {"trainable": "full"}, LIGHTNING_FULL, {"optim.learning_rate": 1e-4}),
    "lightning_data_free": _lightning(834, {"states": "streaming"}, LIGHTNING_LORA),
}


def put(config: ConfigDict, method: Method, num_steps: int, of_teacher: Mapping[str, Any]) -> None:
    """Make ``config``, MLCM's for a teacher, that of another method. of_teacher: its settings for this teacher."""
    plain = base()
    config.update_from_flattened_dict({key: plain[key] for key in OF_METHODS} | dict(method.first))
    config.num_steps = num_steps
    config.update_from_flattened_dict(dict(of_teacher))
    config.stages = tuple(
        {"start": round(share * num_steps), **_with_rate(changes, config.optim.learning_rate)}
        for share, changes in method.later
    )


def _with_rate(changes: Mapping[str, Any], first: float) -> dict[str, Any]:
    """A stage's changes, with its learning rate instead of the share of the first one."""
    rates = {"optim.learning_rate": first * changes[RATE]} if RATE in changes else {}
    return {key: value for key, value in changes.items() if key != RATE} | rates


def reads_latents(config: ConfigDict) -> bool:
    """Whether a stage needs latents of images."""
    return bool({"data", "simulation_data"} & {config.states, *(stage.get("states") for stage in config.stages)})


def get_config(name: str = "mlcm") -> ConfigDict:
    if name not in METHODS:
        raise UserError(f"{name!r} is no method of configs/methods.py: use one of {', '.join(METHODS)}.")
    method, config = METHODS[name], emoji_full_config("two_segments")
    if name == "mlcm":
        scale = method.emoji_steps / config.num_steps
        config.stages = tuple({**change, "start": round(scale * change["start"])} for change in config.stages)
        config.num_steps = method.emoji_steps
    else:
        put(config, method, method.emoji_steps, method.emoji)
    if reads_latents(config):
        config.latents = "runs/emoji_latents.safetensors"
    return config
