"""Distances between the student's answer and the target, by the names that ``config.distance`` takes."""

from ml_collections import ConfigDict

from mlcm_jax.distillation.distances.base import Answers, Distance
from mlcm_jax.distillation.distances.l2 import L2, l2
from mlcm_jax.distillation.distances.latent_lpips import LATENT_LPIPS
from mlcm_jax.distillation.distances.pseudo_huber import PSEUDO_HUBER, pseudo_huber
from mlcm_jax.distillation.distances.x0_norm import X0_NORM
from mlcm_jax.distillation.distances.x0_snr import X0_SNR
from mlcm_jax.rules import check_rules, one_of

DISTANCES: dict[str, Distance] = {
    "l2": L2,
    "pseudo_huber": PSEUDO_HUBER,
    "latent_lpips": LATENT_LPIPS,
    "x0_norm": X0_NORM,
    "x0_snr": X0_SNR,
}

__all__ = ["DISTANCES", "Answers", "Distance", "check", "l2", "pseudo_huber"]


def check(config: ConfigDict) -> None:
    """Raise UserError for settings of the distance that cannot work."""
    check_rules(config, {"distance": one_of(*DISTANCES)})
    DISTANCES[config.distance].check(config)
