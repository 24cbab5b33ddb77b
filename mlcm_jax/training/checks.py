"""Every setting of a stage, checked by its owner before anything is read or compiled."""

from ml_collections import ConfigDict

from mlcm_jax.distillation import losses, segments, state, states, targets, trajectory
from mlcm_jax.rules import GIVEN, check_rules
from mlcm_jax.training import export, loop, optimizer, program, sample_grids


def validate(config: ConfigDict) -> None:
    """Raise UserError for a value that cannot work; what depends on devices and files is checked where it is read.

    Settings that change in the course of a run are to be checked for each stage (training.stages).
    """
    check_rules(config, {"teacher": GIVEN, "prompts": GIVEN, "sample.prompts": GIVEN})
    for owner in (segments, states, trajectory, targets, losses, state, program, optimizer, loop, sample_grids, export):
        owner.check(config)
