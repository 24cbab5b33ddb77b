"""Where the student's answers are compared, by the names that ``config.target`` takes."""

from ml_collections import ConfigDict

from mlcm_jax.distillation.targets.base import Target
from mlcm_jax.distillation.targets.boundary import BOUNDARY, to_boundary
from mlcm_jax.distillation.targets.within_segment import WITHIN_SEGMENT
from mlcm_jax.distillation.targets.x0 import X0, to_x0
from mlcm_jax.rules import check_rules, needs, one_of

TARGETS: dict[str, Target] = {"boundary": BOUNDARY, "within_segment": WITHIN_SEGMENT, "x0": X0}

__all__ = ["BOUNDARY", "TARGETS", "Target", "check", "to_boundary", "to_x0"]


def check(config: ConfigDict) -> None:
    """Raise UserError for settings of the target that cannot work."""
    check_rules(config, {"target": one_of(*TARGETS), "target_network": one_of("student", "ema")})
    if config.target_network == "ema":
        advice = "set the decay of the moving average, such as 0.95"
        needs(config, "ema_decay", advice, because="target_network='ema'")
