"""In the features of a network that has learnt what looks alike (arXiv 1801.03924; on latents, 2406.05768)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.distances.base import Answers, Distance
from mlcm_jax.distillation.frozen_networks import FrozenNetwork, Load
from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import Pipeline, load_network
from mlcm_jax.rules import needs
from mlcm_jax.types import Params

ROLE = "latent_lpips"


def _measure(context: DistillationContext, answers: Answers, weights: Mapping[str, Params]) -> Float[Array, " n"]:
    module: Any = context.networks[ROLE].module
    return module.apply({"params": weights[ROLE]}, answers.prediction, answers.target)


def _check(config: ConfigDict) -> None:
    advice = "name a folder that launch/train_lpips.py wrote"
    needs(config, "latent_lpips", advice, because="distance='latent_lpips'")


def _networks(config: ConfigDict, architecture: Pipeline) -> Mapping[str, Load]:
    folder = config.latent_lpips

    def load() -> FrozenNetwork:
        network = load_network(folder, "LatentLPIPS")
        channels, own = network.config.get("latent_channels", 4), architecture.unet.config.get("in_channels", 4)
        if channels != own:
            raise UserError(
                f"config.latent_lpips={folder!r} reads latents of {channels} channels, and the teacher's have {own}: "
                "learn one for this teacher with launch/train_lpips.py."
            )
        return FrozenNetwork(network, dtype=jnp.float32)

    return {ROLE: load}


LATENT_LPIPS = Distance(_measure, _check, _networks)
