"""The stages of a run: from which step on which settings hold. A pure function of the configuration.

``config.stages`` lists changes: {"start": 6000, "num_segments": 4} means that from step 6000 (the first is 0) on,
num_segments is 4 and everything else is as before. Trained weights, optimizer state and moving average go on.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mlcm_jax.distillation.context import is_guided
from mlcm_jax.distillation.losses import LOSSES
from mlcm_jax.distillation.states import STATE_SOURCES
from mlcm_jax.errors import UserError

# What may change within a run; the rest says what is trained, on what, and where.
CHANGEABLE = (
    "num_segments",
    "states",
    "noise_offset",
    "timesteps",
    "grid",
    "pure_noise",
    "skip",
    "skip_end",
    "solver_steps",
    "target_solver",
    "teacher_network",
    "target_noise",
    "trajectory_solver",
    "guidance_scale",
    "guidance_scale_max",
    "target",
    "target_network",
    "student_prediction_type",
    "distance",
    "losses_min_timestep",
    *(key for source in STATE_SOURCES.values() for key in source.stage_settings),
    *(f"{name}.{key}" for name, loss in LOSSES.items() for key in loss.stage_settings),
    "optim.learning_rate",
)
# What a compiled step takes as an argument: stages that differ only in these share one program.
TRACED = ("num_segments", "guidance_scale", "guidance_scale_max", "optim.learning_rate")


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps start <= step < end (0 is the first), and the whole configuration that holds there.

    renews_teacher: whether the student as it is at the start becomes the former student, the teacher of stages with
    teacher_network="previous": where the number of segments is another one than before. former_prediction_type: what
    that one's output is; "": what the teacher's is.
    """

    start: int
    end: int
    config: ConfigDict
    renews_teacher: bool
    former_prediction_type: str

    def program_key(self) -> str:
        """Equal for stages that one compiled program serves."""
        config = self.config.copy_and_resolve_references()
        for key in TRACED:
            _assign(config, key, 1)
        return f"{config.to_json(sort_keys=True)} {self.former_prediction_type} {is_guided(self.config)}"


def read_stages(config: ConfigDict) -> tuple[Stage, ...]:
    """The stages in order; the first begins at step 0 with the configuration's own settings.

    Raises UserError for a stage without a start, starts that do not rise, and settings that cannot change.
    """
    starts, configs = [0], [_without_stages(config)]
    for number, change in enumerate(config.stages, 2):
        start = _start(change, number, starts[-1])
        changed = configs[-1].copy_and_resolve_references()
        for key, value in change.items():
            if key != "start":
                _change(changed, key, value, number)
        starts.append(start)
        configs.append(changed)
    ends = [*starts[1:], max(config.num_steps, starts[-1] + 1)]
    return tuple(Stage(*fields) for fields in zip(starts, ends, configs, *_teachers(configs), strict=True))


def settings_after(config: ConfigDict, steps: int) -> ConfigDict:
    """The settings by which a student of that many steps was trained last."""
    stages = read_stages(config)
    return stages[stage_at(stages, max(steps - 1, 0))].config


def num_buckets(config: ConfigDict) -> int:
    """Sizes of images that the steps of a run take in turn: step s takes the size s modulo their number."""
    return max(len(config.buckets), 1)


def stage_at(stages: tuple[Stage, ...], step: int) -> int:
    """The number, from 0, of the stage that ``step`` lies in; steps after the end count to the last one."""
    return max(i for i, stage in enumerate(stages) if stage.start <= step)


def _without_stages(config: ConfigDict) -> ConfigDict:
    alone = config.copy_and_resolve_references()
    alone.stages = ()
    return alone


def _teachers(configs: Sequence[ConfigDict]) -> tuple[list[bool], list[str]]:
    """``Stage.renews_teacher`` and ``Stage.former_prediction_type`` of each stage."""
    renews, types = [True], [""]
    for before, config in itertools.pairwise(configs):
        renews.append(before.num_segments != config.num_segments)
        types.append(before.student_prediction_type if renews[-1] else types[-1])
    return renews, types


def _start(change: Mapping[str, Any], number: int, before: int) -> int:
    start = change.get("start")
    if not isinstance(start, int) or start <= before:
        raise UserError(f'config.stages: stage {number} needs a "start" step after {before}, and has {start!r}.')
    return start


def _change(config: ConfigDict, key: str, value: Any, number: int) -> None:
    if key not in CHANGEABLE:
        raise UserError(f"config.stages: stage {number} changes {key!r}; only these can: {', '.join(CHANGEABLE)}.")
    try:
        _assign(config, key, value)
    except TypeError:
        raise UserError(f"config.stages: stage {number} sets {key} to {value!r}, which is of another type.") from None


def _assign(config: ConfigDict, key: str, value: Any) -> None:
    *outer, last = key.split(".")
    for part in outer:
        config = config[part]
    config[last] = value
