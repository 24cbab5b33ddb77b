"""Make images with any diffusers folder: python launch/sample.py --model=DIR --prompt="red heart, noto style".

The sampler is the folder's own scheduler. Several images (several --prompt, or several latents in --latents) become one
grid. Without --model the shipped emoji student is used; without --prompt as well, its example captions.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from mlcm_jax.cli import run_main
from mlcm_jax.data.npy import read_npy
from mlcm_jax.data.prompts import read_prompts
from mlcm_jax.diffusion.samplers import SAMPLERS
from mlcm_jax.errors import UserError
from mlcm_jax.hub.controlnet import load_controlnet
from mlcm_jax.hub.ip_adapter import load_ip_adapter
from mlcm_jax.hub.lora import parse_lora, with_loras
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.hub.t2i_adapter import load_t2i_adapter
from mlcm_jax.hub.vae import load_vae
from mlcm_jax.images import image_grid, open_image, write_image
from mlcm_jax.model_flags import EMOJI, allow_shipped_model, chosen_loras, load_model, named_model
from mlcm_jax.models.attention_backend import BACKENDS, AttentionBackend
from mlcm_jax.outputs import atomic_write, check_file, check_image_file
from mlcm_jax.rng import MAX_SEED
from mlcm_jax.sampling.control import Adapter, AnyControl, Control, ImagePrompt
from mlcm_jax.sampling.decode import TILING
from mlcm_jax.sampling.image_to_image import checked_strength
from mlcm_jax.sampling.text_to_image import TextToImage
from mlcm_jax.size_flags import flagged_size

LORA = flags.DEFINE_multi_string(
    "lora", None, "LoRA, PLACE or PLACE:SCALE; give it again for more. A folder brings its sampler along."
)
VAE = flags.DEFINE_string("vae", None, "Folder of an autoencoder to decode with in place of the model's own.")
CONTROLNET = flags.DEFINE_multi_string("controlnet", None, "Folder of a ControlNetModel; give it again for more.")
CONTROL_IMAGE = flags.DEFINE_multi_string("control_image", None, "The image that it follows, one for each ControlNet.")
CONTROL_SCALE = flags.DEFINE_multi_float("control_scale", None, "How much it adds, one for each; default: 1.")
T2I_ADAPTER = flags.DEFINE_multi_string("t2i_adapter", None, "Folder of a T2IAdapter; give it again for more.")
ADAPTER_IMAGE = flags.DEFINE_multi_string("adapter_image", None, "The image that it follows, one for each of them.")
ADAPTER_SCALE = flags.DEFINE_multi_float("adapter_scale", None, "How much it adds, one for each; default: 1.")
ADAPTER_FACTOR = flags.DEFINE_float(
    "adapter_factor", None, "The part of the steps, the first, that they add in; default: 1.", 0.0, 1.0
)
IP_ADAPTER = flags.DEFINE_multi_string("ip_adapter", None, "An IP-Adapter's .safetensors file, or a folder with one.")
IP_ADAPTER_IMAGE = flags.DEFINE_multi_string("ip_adapter_image", None, "The image as a prompt, one for each of them.")
IP_ADAPTER_SCALE = flags.DEFINE_multi_float("ip_adapter_scale", None, "Of the attention to it; default: 1.")
IP_ADAPTER_IMAGE_ENCODER = flags.DEFINE_string(
    "ip_adapter_image_encoder", None, "Folder of its image encoder; default: image_encoder beside the file."
)
IMAGE = flags.DEFINE_string("image", None, "An image to start from, for all prompts.")
STRENGTH = flags.DEFINE_float("strength", None, "With --image: the part of the steps that is taken; default: 0.5.")
MASK = flags.DEFINE_string("mask", None, "With --image: an image of its size, white where it is made new.")
PROMPT = flags.DEFINE_multi_string("prompt", None, "Give it again for more images.")
STEPS = flags.DEFINE_integer("steps", 4, "Sampling steps.")
SCHEDULER = flags.DEFINE_enum("scheduler", None, list(SAMPLERS), "In place of the model's own, from its settings.")
ETA = flags.DEFINE_float("eta", 0.0, "TCDScheduler: part of fresh noise at each step, 0 (none) to 1.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the initial noise.", 0, MAX_SEED)
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", None, "Default: 1 (none) for distilled models, 5 for others.")
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", "", "What a --guidance_scale above 1 leads away from.")
LATENTS = flags.DEFINE_string("latents", None, "Initial noise, .npy, float32 [N, 4, h, w], as diffusers takes it.")
SAVE_LATENTS = flags.DEFINE_string("save_latents", None, "Where to write the initial noise, .npy.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the UNet's and text encoders' arithmetic.")
ATTENTION = flags.DEFINE_enum("attention", "auto", BACKENDS, "How the UNet computes attention.")
VAE_TILING = flags.DEFINE_enum("vae_tiling", "auto", TILING, "Decode in tiles; auto: images larger than 1024 px.")
OUT = flags.DEFINE_string("out", "sample.png", "The image, or a grid of them.")

allow_shipped_model()


def asked_prompts() -> list[str]:
    """--prompt; for the shipped student its example captions, where there is none. Raises UserError for others."""
    if PROMPT.value:
        return PROMPT.value
    if named_model():
        raise UserError("There is no prompt: give one with --prompt.")
    return read_prompts(EMOJI / "prompts" / "grid.txt")


def given_noise(pipeline: Pipeline, num_prompts: int) -> jax.Array:
    """Noise [N, h, w, c] of --latents; raises UserError for an array that does not fit the model or the prompts."""
    channels, latents = pipeline.unet.config.get("in_channels", 4), read_npy(str(LATENTS.value))
    if latents.ndim != 4 or latents.shape[1] != channels or latents.dtype != np.float32:
        raise UserError(
            f"--latents={LATENTS.value} holds {latents.dtype} {list(latents.shape)}: it must be float32 "
            f"[N, {channels}, h, w]."
        )
    if num_prompts not in (1, len(latents)):
        raise UserError(f"--latents={LATENTS.value} is for {len(latents)} images, and there are {num_prompts} prompts.")
    return jnp.asarray(latents.transpose(0, 2, 3, 1))


KINDS = (
    (CONTROLNET, CONTROL_IMAGE, CONTROL_SCALE),
    (T2I_ADAPTER, ADAPTER_IMAGE, ADAPTER_SCALE),
    (IP_ADAPTER, IP_ADAPTER_IMAGE, IP_ADAPTER_SCALE),
)


class Asked(NamedTuple):
    """A network that controls: where it is, the image that it follows and how much it counts."""

    place: str
    image: Image.Image
    scale: float


def asked_controls() -> list[list[Asked]]:
    """Those of each of ``KINDS``; raises UserError unless each has an image, and a scale or none."""
    for setting, network in ((ADAPTER_FACTOR, T2I_ADAPTER), (IP_ADAPTER_IMAGE_ENCODER, IP_ADAPTER)):
        if setting.value is not None and not network.value:
            raise UserError(f"There is --{setting.name} and no --{network.name}: give that as well.")
    found = []
    for network, image, scale in KINDS:
        places, images, scales = network.value or [], image.value or [], scale.value or []
        if len(images) != len(places) or (scales and len(scales) != len(places)):
            raise UserError(
                f"There are {len(places)} --{network.name}, {len(images)} --{image.name} and {len(scales)} "
                f"--{scale.name}: give each --{network.name} one image, and each or none of them a scale."
            )
        opened = [open_image(each) for each in images]
        found.append([Asked(*each) for each in zip(places, opened, scales or [1.0] * len(places), strict=True)])
    return found


def loaded_controls(pipeline: Pipeline, asked: list[list[Asked]]) -> list[AnyControl]:
    """What ``asked_controls`` found, for the pipeline."""
    dtype, (controlnets, t2i_adapters, ip_adapters) = jnp.dtype(DTYPE.value), asked
    factor = 1.0 if ADAPTER_FACTOR.value is None else ADAPTER_FACTOR.value
    encoder = IP_ADAPTER_IMAGE_ENCODER.value
    controls: list[AnyControl] = []
    for each in controlnets:
        controls.append(Control(load_controlnet(each.place, pipeline, dtype=dtype), each.image, each.scale))
    for each in t2i_adapters:
        controls.append(Adapter(load_t2i_adapter(each.place, pipeline, dtype=dtype), each.image, each.scale, factor))
    for each in ip_adapters:
        adapter = load_ip_adapter(each.place, pipeline, image_encoder=encoder, dtype=dtype)
        controls.append(ImagePrompt(adapter, each.image, each.scale))
    return controls


def main():
    check_image_file("out", OUT.value)
    if SAVE_LATENTS.value:
        check_file("save_latents", SAVE_LATENTS.value, ".npy")
    prompts, asked = asked_prompts(), asked_controls()
    image = open_image(IMAGE.value) if IMAGE.value else None
    mask = open_image(MASK.value, "L") if MASK.value else None
    checked_strength(image, STRENGTH.value, mask)
    for entry in LORA.value or []:
        parse_lora(entry)  # answers a mistake before the model is read
    pipeline = load_model(DTYPE.value)
    pipeline = with_loras(pipeline, chosen_loras(LORA.value))
    if SCHEDULER.value:
        pipeline = pipeline.with_scheduler_class(SCHEDULER.value)
    pipeline = pipeline.with_attention(AttentionBackend(ATTENTION.value))
    if VAE.value:
        vae = load_vae(VAE.value, pipeline, dtype=jnp.dtype(DTYPE.value))
        pipeline = dataclasses.replace(pipeline, vae=vae)
    controls = loaded_controls(pipeline, asked)
    sampler = TextToImage(pipeline)
    if LATENTS.value is None:
        noise = sampler.noise(len(prompts), seed=SEED.value, image_size=flagged_size())
    else:
        noise = given_noise(pipeline, len(prompts))
    if SAVE_LATENTS.value:
        with atomic_write(SAVE_LATENTS.value) as f:
            np.save(f, np.asarray(noise).transpose(0, 3, 1, 2))
    images = sampler(
        prompts,
        num_steps=STEPS.value,
        guidance_scale=GUIDANCE_SCALE.value,
        negative_prompt=NEGATIVE_PROMPT.value,
        seed=SEED.value,
        latents=noise,
        eta=ETA.value,
        controls=controls,
        image=image,
        strength=STRENGTH.value,
        mask=mask,
        vae_tiling=VAE_TILING.value,
    )
    n = len(images)
    write_image(images[0] if n == 1 else image_grid(images, columns=min(n, 8)), OUT.value)
    what = f"{n} image{'s' if n > 1 else ''}, {STEPS.value} steps of {pipeline.scheduler_config['_class_name']}"
    print(f"{OUT.value}: {what}")


if __name__ == "__main__":
    run_main(main)
