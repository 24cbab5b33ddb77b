"""Runs of equal work: as many steps as a number of FLOPs is enough for, with stages at the same parts of a run."""

import itertools
import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from mlcm_jax.errors import UserError
from mlcm_jax.training.program import build_program
from mlcm_jax.training.run import describe_teacher
from mlcm_jax.training.stages import read_stages


def stage_flops(config: ConfigDict) -> list[float]:
    """FLOPs of a step of each stage: matrix products and convolutions, loops in full, critics and teacher included."""
    plan = build_program(config, describe_teacher(config, weights_needed=False)).plan
    return [stage.flops_per_step for stage in plan.stages]


def scaled_starts(starts: Sequence[int], length: int, num_steps: int) -> list[int]:
    """Where the stages of a run of ``length`` steps begin in one of ``num_steps``: in proportion, to a whole step."""
    return [round(start * num_steps / length) for start in starts]


def work(flops: Sequence[float], starts: Sequence[int], num_steps: int) -> float:
    """FLOPs of a run. flops: of a step of each stage."""
    ends = [*starts[1:], num_steps]
    return sum((end - start) * each for each, start, end in zip(flops, starts, ends, strict=True))


def steps_for(target: float, flops: Sequence[float], starts: Sequence[int], length: int) -> int:
    """The number of steps whose work is nearest to ``target`` FLOPs. starts: of the stages in ``length`` steps.

    Raises UserError where that is more than a step away, since each stage has a step.
    """
    per_step = work(flops, starts, length) / length
    # Work is in proportion to the steps, but for starts that are rounded by up to half a step.
    exact, margin = round(target / per_step), 1 + math.ceil(2 * sum(flops) / per_step)
    found = {n: scaled_starts(starts, length, n) for n in range(max(1, exact - margin), exact + margin + 1)}
    possible = [n for n, scaled in found.items() if all(a < b for a, b in itertools.pairwise([*scaled, n]))]
    errors = {n: abs(work(flops, found[n], n) - target) for n in possible}
    if exact < len(starts) or not errors or min(errors.values()) > max(flops):
        raise UserError(
            f"{target / 1e12:.3g} TFLOP are about {exact} steps of {per_step / 1e12:.3g}, too few for {len(starts)} "
            f"stage{'s' * (len(starts) > 1)}: raise --tflop."
        )
    return min(errors, key=lambda n: errors[n])


def of_length(config: ConfigDict, num_steps: int) -> ConfigDict:
    """A copy of a run's configuration with another length."""
    stages = read_stages(config)
    starts = scaled_starts([stage.start for stage in stages], config.num_steps, num_steps)
    copy = config.copy_and_resolve_references()
    copy.stages = tuple({**change, "start": start} for change, start in zip(config.stages, starts[1:], strict=True))
    copy.num_steps = num_steps
    return copy
