"""A reward model's score of the decoded latents (arXiv 2406.05768, 2304.05977), with a second one to watch it."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mlcm_jax.distillation.frozen_networks import FrozenNetwork, Load
from mlcm_jax.distillation.losses.base import Loss
from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import Network, Pipeline
from mlcm_jax.hub.vae import load_vae
from mlcm_jax.models.vae import AutoencoderKL
from mlcm_jax.parallel.sharding import gathered, split_batch
from mlcm_jax.rewards.registry import REWARD_MODELS, kind_of, parse_places
from mlcm_jax.rules import NOT_NEGATIVE, check_rules, needs, one_of
from mlcm_jax.types import Latents, Params

REWARD_MODEL, HELD_OUT, DECODER = "reward_model", "held_out_reward_model", "decoder"  # roles
DECODING = ("decoder", "post_quant_conv")  # parts of an autoencoder that turn latents into images

Scores = Float[Array, " n"]
REFL_SCALE = 1e-3


class Preference(Loss):
    """The held-out reward model is reported and never learnt from: where its score falls while the other's rises, the
    student exploits the reward model."""

    name: ClassVar[str] = "preference"
    stage_settings: ClassVar[tuple[str, ...]] = ("weight", "target")

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        super().check(config)
        check_rules(config, {"preference.form": one_of(*FORMS), "preference.stop_when_held_out_falls": NOT_NEGATIVE})
        settings = config.preference
        if cls.is_active(config):
            advice = "name a reward model, such as clip=FOLDER"
            needs(config, "preference.reward_model", advice, because="preference.weight")
        if settings.stop_when_held_out_falls > 0:
            advice = "name a reward model to watch"
            needs(config, "preference.held_out_reward_model", advice, because="preference.stop_when_held_out_falls")
        if settings.form == "margin":
            needs(config, "preference.negative_prompt", "give one", because="preference.form='margin'")
        if settings.reward_model and settings.reward_model == settings.held_out_reward_model:
            raise UserError(
                f"config.preference.held_out_reward_model={settings.reward_model!r} is the reward model itself: use "
                "another one, or none."
            )

    @classmethod
    def networks(cls, config: ConfigDict, architecture: Pipeline) -> Mapping[str, Load]:
        roles = [role for role in (REWARD_MODEL, HELD_OUT) if config.preference[role]]
        loads = {role: partial(_load_reward_model, role, config) for role in roles}
        return loads | {DECODER: partial(_load_decoder, config, architecture)}

    def __call__(self, critic, inputs):
        config, networks = self.context.config, self.context.networks
        weights, tokens = inputs.frozen.networks, inputs.examples.prompt_tokens
        settings, remat = config.preference, config.remat_policy if config.remat else None
        decoder = gathered(weights[DECODER], config.sharding_rules)

        def score(role, images, tokens):
            return networks[role].reward(weights[role], images, tokens)

        images = split_batch(decode(networks[DECODER], decoder, split_batch(inputs.x0), remat))
        scores, negative = score(REWARD_MODEL, images, tokens[REWARD_MODEL]), None
        if settings.form == "margin":
            negative = score(REWARD_MODEL, images, self._negative_tokens(len(images)))
        reported = {"score": scores.mean()}
        if HELD_OUT in networks:
            reported["held_out"] = score(HELD_OUT, images, tokens[HELD_OUT]).mean()
        return FORMS[settings.form](scores, negative, settings.target).mean(), jax.lax.stop_gradient(reported)

    def _negative_tokens(self, n: int) -> Int[Array, "n t"]:
        """The negative prompt for n images, as the reward model reads it."""
        tokens = self.context.networks[REWARD_MODEL].tokenize([self.context.config.preference.negative_prompt])
        return jnp.broadcast_to(jnp.asarray(tokens), (n, tokens.shape[1]))


def margin(scores: Scores, negative: Scores | None, target: float) -> Scores:
    """relu(target - score) + relu(negative): the score is to reach the target, and the score of the same image for a
    negative prompt is to fall to 0 (arXiv 2406.05768, sixth version, with a target of 16 for MPS)."""
    if negative is None:
        raise ValueError("the margin form needs scores for the negative prompt")
    return jax.nn.relu(target - scores) + jax.nn.relu(negative)


def refl(scores: Scores, negative: Scores | None, target: float) -> Scores:
    """1e-3 relu(target - score), with a target of 2 for ImageReward (arXiv 2304.05977, sec. 3.2)."""
    return REFL_SCALE * jax.nn.relu(target - scores)


Form = Callable[[Scores, Scores | None, float], Scores]
FORMS: dict[str, Form] = {"margin": margin, "refl": refl}


def decode(vae: Network, params: Params, latents: Latents, remat: str | None = None) -> Float[Array, "n H W 3"]:
    """Images, about [-1, 1], of scaled latents. remat: policy of models/remat.py for the backward pass."""
    module: Any = vae.module
    if remat and isinstance(module, AutoencoderKL):  # an AutoencoderTiny's activations are small
        module = module.clone(remat=remat)
    return module.apply({"params": params}, latents / module.config.scaling_factor, method="decode")


def _load_reward_model(role: str, config: ConfigDict) -> FrozenNetwork:
    place = config.preference[role]
    ((name, folder),) = parse_places(f"config.preference.{role}", [place], REWARD_MODELS).items()
    reward_model = REWARD_MODELS[kind_of(name)].load(folder, dtype=jnp.dtype(config.compute_dtype))
    settings = config.preference
    learnt_from_a_margin = role == REWARD_MODEL and settings.form == "margin"
    if learnt_from_a_margin and not reward_model.tokenize([settings.negative_prompt]).size:
        raise UserError(
            f"config.preference.form='margin' needs a reward model that reads prompts, which {place!r} does not: use "
            "refl."
        )
    return FrozenNetwork(reward_model, tokenize=reward_model.tokenize)


def _load_decoder(config: ConfigDict, architecture: Pipeline) -> FrozenNetwork:
    folder, dtype = config.preference.decoder, jnp.dtype(config.compute_dtype)
    if folder:
        vae = load_vae(folder, architecture, dtype=dtype)
        return FrozenNetwork(dataclasses.replace(vae, params=_decoding(vae.params)), dtype=jnp.float32)
    vae, module = architecture.vae, architecture.vae.module
    in_float32 = getattr(module.config, "force_upcast", False)
    module = module.clone(dtype=jnp.float32 if in_float32 else dtype)
    vae = dataclasses.replace(vae, module=module, params=_decoding(vae.params))
    return FrozenNetwork(vae, dtype=jnp.float32, of_teacher=_decoding)


def _decoding(params: Params) -> Params:
    return {name: part for name, part in params.items() if name in DECODING}
