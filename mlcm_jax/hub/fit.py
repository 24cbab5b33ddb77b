"""Whether the networks of a pipeline fit each other, by their settings alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from mlcm_jax.errors import UserError, shortened
from mlcm_jax.hub.tensor_reader import read_json

NUM_TIME_IDS = 6
# What a UNet is that takes other than 4 channels
OTHER_INPUTS = {
    9: "an inpainting UNet, which takes a mask and the masked image as well",
    8: "a UNet that edits an image, which it takes as well",
    5: "a UNet that takes a depth map as well",
    7: "an upscaling UNet, which takes the small image as well",
}


def check_fit(folder: Path, pipeline_class: str, modules: Mapping[str, nn.Module], unet: Mapping[str, Any]) -> None:
    """Raise UserError for networks that do not fit each other.

    modules: by the name of their folder. unet: the UNet's config.json, which is in order by itself.
    """
    vae: Any = modules["vae"]
    encoders: list[Any] = [module for part, module in modules.items() if part.startswith("text_encoder")]
    channels, latent = unet.get("in_channels", 4), vae.config.latent_channels
    if channels != latent:
        what = OTHER_INPUTS.get(channels, f"a UNet of {channels} channels")
        raise UserError(
            f"{folder} has {what} (in_channels={channels}), and its autoencoder's latents have {latent} channels: use "
            "a text-to-image model."
        )
    out = unet.get("out_channels", 4)
    if out != latent:
        raise UserError(
            f"{folder} has a UNet of out_channels={out}, and its autoencoder's latents have {latent} channels: use a "
            "UNet that predicts the noise alone."
        )
    width, states = unet.get("cross_attention_dim", 1280), sum(e.states_dim for e in encoders)
    if width != states:
        widths = " + ".join(str(e.states_dim) for e in encoders)
        raise UserError(
            f"{folder} has a UNet of cross_attention_dim={width}, and its text encoders' states are {widths} wide: use "
            "the text encoders that the UNet was trained with."
        )
    _check_added(folder, pipeline_class, encoders[-1], unet)


def check_class_name(folder: Path, class_name: str, what: str) -> None:
    """Raise UserError unless the config.json in ``folder`` is of that class. what: such a network, in words."""
    found = read_json(folder / "config.json").get("_class_name")
    if found != class_name:
        raise UserError(f"{folder} holds {shortened(found, 60)}, not {class_name}: name the folder of {what}.")


def check_made_for(place: Path, ours: Mapping[str, Any], its: Mapping[str, Any], what: str) -> None:
    """Raise UserError where what a network was made for is not the model. what: the network, in words."""
    for key, value in ours.items():
        if its[key] != value:
            raise UserError(
                f"{place} was made for another UNet ({key}: {shortened(its[key], 60)}, and the model has "
                f"{shortened(value, 60)}): use {what} of the model's architecture."
            )


def _check_added(folder: Path, pipeline_class: str, encoder: Any, unet: Mapping[str, Any]) -> None:
    """The pooled state and time ids that SDXL's UNets take, and those of SD 1.x do not."""
    wanted = "text_time" if pipeline_class == "StableDiffusionXLPipeline" else None
    added = unet.get("addition_embed_type")
    if added != wanted:
        raise UserError(
            f"{folder} is a {pipeline_class}, and its UNet has addition_embed_type={added!r}, not {wanted!r}: use the "
            "UNet that belongs to this pipeline."
        )
    if added is None:
        return
    pooled = encoder.pooled_dim
    joined, each = unet["projection_class_embeddings_input_dim"], unet["addition_time_embed_dim"]
    if joined != pooled + NUM_TIME_IDS * each:
        raise UserError(
            f"{folder} has a UNet of projection_class_embeddings_input_dim={joined}, and its text encoder's pooled "
            f"state and six time ids are {pooled} + 6 x {each} wide: use the text encoder that the UNet was trained "
            "with."
        )
