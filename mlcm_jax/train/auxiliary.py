"""Frozen networks beside the teacher, by their role in the loss: what they are, their weights, and what they answer.

decoder: latents to pictures, for the preference term. scorer, guard: judges of those pictures.
latent_lpips: a learnt distance of latents.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.judge import Judge
from mlcm_jax.evaluation.scorers import JUDGES, kind_of, parse_places
from mlcm_jax.hub.pipeline import Network, Pipeline, load_network
from mlcm_jax.hub.vae import load_vae
from mlcm_jax.types import Latents, Params

DECODING = ("decoder", "post_quant_conv")  # parts of an autoencoder that turn latents into pictures


@dataclasses.dataclass(frozen=True)
class Auxiliary:
    """Networks by role. The decoder's parameters are ShapeDtypeStructs where it is the teacher's own."""

    decoder: Network | None = None
    judges: Mapping[str, Judge] = dataclasses.field(default_factory=dict)
    latent_lpips: Network | None = None

    def params(self) -> dict[str, Params]:
        """Weights by role; of the decoder only what decodes."""
        params = {role: judge.params for role, judge in self.judges.items()}
        if self.decoder is not None:
            params["decoder"] = _decoding(self.decoder.params)
        if self.latent_lpips is not None:
            params["latent_lpips"] = self.latent_lpips.params
        return params

    def shapes(self, dtype: Any) -> dict[str, Params]:
        """ShapeDtypeStructs of the weights: of judges in ``dtype``, of the others in float32."""
        return {
            role: jax.tree.map(partial(_shape, dtype=dtype if role in self.judges else jnp.float32), tree)
            for role, tree in self.params().items()
        }

    def placed(self, shapes: Mapping[str, Params], vae: Network) -> dict[str, Params]:
        """The weights with dtypes and shardings of ``shapes``. vae: the teacher's, with its weights."""
        params = self.params()
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params.get("decoder"))):
            params["decoder"] = _decoding(vae.params)
        return jax.tree.map(lambda a, s: jax.device_put(jnp.asarray(a, s.dtype), s.sharding), params, dict(shapes))

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
    latent_lpips = _read_latent_lpips(measured[0], architecture) if measured else None
    used = [config for config in configs if config.preference.weight > 0]
    if not used:
        return Auxiliary(latent_lpips=latent_lpips)
    settings, dtype = used[0].preference, jnp.dtype(used[0].compute_dtype)
    places = {role: settings[role] for role in ("scorer", "guard") if settings[role]}
    if len(set(places.values())) < len(places):
        raise UserError(f"config.preference.guard={settings.guard!r} is the scorer itself: use another judge, or none.")
    judges = {role: _read_judge(role, place, dtype) for role, place in places.items()}
    if settings.form == "margin" and not judges["scorer"].tokenize([settings.negative_prompt]).size:
        raise UserError(
            f"config.preference.form='margin' needs a scorer that reads prompts, which {settings.scorer!r} does not: "
            "use refl."
        )
    return Auxiliary(_read_decoder(settings.decoder, architecture, dtype), judges, latent_lpips)


def _read_judge(role: str, place: str, dtype: Any) -> Judge:
    ((name, folder),) = parse_places(f"config.preference.{role}", [place], tuple(JUDGES)).items()
    return JUDGES[kind_of(name)](folder, dtype=dtype)


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


def _shape(leaf: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype)


def _decoding(params: Params) -> Params:
    return {name: part for name, part in params.items() if name in DECODING}
