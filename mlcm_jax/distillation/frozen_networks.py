"""Frozen networks beside the teacher, by their role in the loss: what they are, their weights, and what they answer.

decoder: latents to pictures, for the preference term. scorer, guard: judges of those pictures.
latent_lpips: a learnt distance of latents.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import Network, Pipeline, load_network
from mlcm_jax.hub.vae import load_vae
from mlcm_jax.rewards.registry import REWARD_MODELS, kind_of, parse_places
from mlcm_jax.rewards.reward_model import RewardModel
from mlcm_jax.types import Latents, Params

DECODING = ("decoder", "post_quant_conv")  # parts of an autoencoder that turn latents into pictures


@dataclasses.dataclass(frozen=True)
class Auxiliary:
    """Networks by role; their parameters are ShapeDtypeStructs.

    weights: by role, of the decoder only what decodes; without those that are the teacher's own, and empty once they
    have been placed.
    """

    decoder: Network | None = None
    judges: Mapping[str, RewardModel] = dataclasses.field(default_factory=dict)
    latent_lpips: Network | None = None
    weights: dict[str, Params] = dataclasses.field(default_factory=dict)

    def shapes(self, dtype: Any) -> dict[str, Params]:
        """ShapeDtypeStructs of the weights: of judges in ``dtype``, of the others in float32."""
        params = {role: judge.params for role, judge in self.judges.items()}
        if self.decoder is not None:
            params["decoder"] = _decoding(self.decoder.params)
        if self.latent_lpips is not None:
            params["latent_lpips"] = self.latent_lpips.params
        return {
            role: jax.tree.map(partial(_shape, dtype=dtype if role in self.judges else jnp.float32), tree)
            for role, tree in params.items()
        }

    def placed(self, shapes: Mapping[str, Params], vae: Network) -> dict[str, Params]:
        """The weights with dtypes and shardings of ``shapes``, once: they are given away. vae: the teacher's, with its
        weights."""
        weights = {role: self.weights.pop(role, None) or _decoding(vae.params) for role in shapes}
        return jax.tree.map(_put, weights, dict(shapes))

    def decode(self, params: Mapping[str, Params], latents: Latents) -> Float[Array, "n H W 3"]:
        """Pictures, about [-1, 1], of scaled latents."""
        if self.decoder is None:
            raise ValueError("no stage of this run decodes latents")
        module: Any = self.decoder.module
        return module.apply({"params": params["decoder"]}, latents / module.config.scaling_factor, method="decode")

    def score(
        self, params: Mapping[str, Params], role: str, images: Float[Array, "n H W 3"], tokens: Int[Array, "n t"]
    ) -> Float[Array, " n"]:
        """What the judge of a role says of pictures in [-1, 1]."""
        return self.judges[role].reward(params[role], images, tokens)

    def latent_distance(self, params: Mapping[str, Params], a: Latents, b: Latents) -> Float[Array, " n"]:
        """The learnt distance of each pair of scaled latents."""
        if self.latent_lpips is None:
            raise ValueError("no stage of this run has a learnt distance")
        distances: Any = self.latent_lpips.module.apply({"params": params["latent_lpips"]}, a, b)
        return distances

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Int[np.ndarray, "n t"]]:
        """The prompts as each judge reads them."""
        return {role: judge.tokenize(prompts) for role, judge in self.judges.items()}

    def negative_tokens(self, prompt: str, n: int) -> Int[Array, "n t"]:
        """The same prompt for n pictures, as the scorer reads it."""
        tokens = self.judges["scorer"].tokenize([prompt])
        return jnp.broadcast_to(jnp.asarray(tokens), (n, tokens.shape[1]))


def read_auxiliary(configs: Sequence[ConfigDict], architecture: Pipeline) -> Auxiliary:
    """The networks that the configurations of a run's stages need. architecture: the teacher's pipeline in shapes.

    Weights of judges are read here, before anything is compiled. Raises UserError for an unknown judge, a guard that
    is the scorer, a negative prompt for a scorer that reads no prompts, and as the loaders of the networks do.
    """
    measured = [config.latent_lpips for config in configs if config.distance == "latent_lpips"]
    used = [config for config in configs if config.preference.weight > 0]
    judges, decoder, latent_lpips = {}, None, None
    with _on_the_host():
        if measured:
            latent_lpips = _read_latent_lpips(measured[0], architecture)
        if used:
            judges = _read_judges(used[0])
            dtype = jnp.dtype(used[0].compute_dtype)
            decoder = _read_decoder(used[0].preference.decoder, architecture, dtype)
    weights = {role: judge.params for role, judge in judges.items()}
    weights |= {"decoder": _decoding(decoder.params)} if decoder and used[0].preference.decoder else {}
    weights |= {"latent_lpips": latent_lpips.params} if latent_lpips else {}
    without = [None if network is None else _described(network) for network in (decoder, latent_lpips)]
    return Auxiliary(without[0], {role: _described(judge) for role, judge in judges.items()}, without[1], weights)


@contextlib.contextmanager
def _on_the_host() -> Iterator[None]:
    """Where weights wait for their place: an accelerator would hold them twice, and whole."""
    config: Any = jax.config
    before, platforms = config.jax_default_device, config.jax_platforms
    if not platforms or "cpu" in platforms:
        # not jax.default_device(), which counts in this thread alone: weights are read by several
        config.update("jax_default_device", jax.local_devices(backend="cpu")[0])
    try:
        yield
    finally:
        config.update("jax_default_device", before)


def _described(network: Any) -> Any:
    """A Network or a RewardModel without its weights."""
    return dataclasses.replace(network, params=jax.tree.map(lambda a: _shape(a, a.dtype), network.params))


def _read_judges(config: ConfigDict) -> dict[str, RewardModel]:
    settings = config.preference
    places = {role: settings[role] for role in ("scorer", "guard") if settings[role]}
    if len(set(places.values())) < len(places):
        raise UserError(f"config.preference.guard={settings.guard!r} is the scorer itself: use another judge, or none.")
    judges = {role: _read_judge(role, place, jnp.dtype(config.compute_dtype)) for role, place in places.items()}
    if settings.form == "margin" and not judges["scorer"].tokenize([settings.negative_prompt]).size:
        raise UserError(
            f"config.preference.form='margin' needs a scorer that reads prompts, which {settings.scorer!r} does not: "
            "use refl."
        )
    return judges


def _read_judge(role: str, place: str, dtype: Any) -> RewardModel:
    ((name, folder),) = parse_places(f"config.preference.{role}", [place], REWARD_MODELS).items()
    return REWARD_MODELS[kind_of(name)].load(folder, dtype=dtype)


def _read_latent_lpips(folder: str, architecture: Pipeline) -> Network:
    network = load_network(folder, "LatentLPIPS")
    channels, own = network.config.get("latent_channels", 4), architecture.unet.config.get("in_channels", 4)
    if channels != own:
        raise UserError(
            f"config.latent_lpips={folder!r} reads latents of {channels} channels, and the teacher's have {own}: learn "
            "one for this teacher with launch/train_lpips.py."
        )
    return network


def _read_decoder(folder: str, architecture: Pipeline, dtype: Any) -> Network:
    if folder:
        return load_vae(folder, architecture, dtype=dtype)
    module: Any = architecture.vae.module
    in_float32 = getattr(module.config, "force_upcast", False)
    return dataclasses.replace(architecture.vae, module=module.clone(dtype=jnp.float32 if in_float32 else dtype))


def _put(array: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    if not array.is_fully_addressable:  # the teacher's, on the mesh already
        return jax.device_put(array.astype(like.dtype), like.sharding)
    values = np.asarray(array).astype(like.dtype)
    return jax.make_array_from_callback(like.shape, like.sharding, values.__getitem__)


def _shape(leaf: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype)


def _decoding(params: Params) -> Params:
    return {name: part for name, part in params.items() if name in DECODING}
