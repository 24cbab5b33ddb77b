"""Sampling with ControlNets, T2I-Adapters and IP-Adapters: a UNet that they change, and its conditioning with the
images that they follow."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float
from PIL import Image

from mlcm_jax.errors import UserError
from mlcm_jax.hub.ip_adapter import IPAdapter
from mlcm_jax.hub.pipeline import Network
from mlcm_jax.image_size import ImageSize
from mlcm_jax.images import resized
from mlcm_jax.models.attention import ImageTokens
from mlcm_jax.models.controlnet import AdapterFeatures, Controlled, ControlledUNet
from mlcm_jax.types import Params, TextConditioning


class Control(NamedTuple):
    """network: of hub.controlnet. image: what it follows, such as edges, of any size. scale: of what it adds."""

    network: Network
    image: Image.Image
    scale: float = 1.0


class Adapter(NamedTuple):
    """network: of hub.t2i_adapter. image, scale: as Control has them. factor: the part of the steps, the first, that
    it adds in, 0 to 1."""

    network: Network
    image: Image.Image
    scale: float = 1.0
    factor: float = 1.0


class ImagePrompt(NamedTuple):
    """adapter: of hub.ip_adapter. image: what is to be seen. scale: of the attention to it, beside the prompt's."""

    adapter: IPAdapter
    image: Image.Image
    scale: float = 1.0


AnyControl = Control | Adapter | ImagePrompt


def check_controls(controls: Sequence[AnyControl]) -> None:
    """Raise UserError for a scale that is no finite number and a factor that is no part."""
    for control in controls:
        if not math.isfinite(control.scale):
            raise UserError(f"A control has the scale {control.scale}: use a finite number.")
        if isinstance(control, Adapter) and not 0 <= control.factor <= 1:
            raise UserError(f"A T2I-Adapter has the factor {control.factor}: use the part of the steps, 0 to 1.")


def controlled_unet(unet: Network, controls: Sequence[AnyControl]) -> Network:
    """The UNet with its ControlNets and IP-Adapters, whose conditioning ``controlled`` makes."""
    module: Any = unet.module
    networks = [control.network for control in controls if isinstance(control, Control)]
    controlnets: Any = tuple(network.module for network in networks)
    params = {f"controlnets_{i}": network.params for i, network in enumerate(networks)}
    adapters = [control.adapter for control in controls if isinstance(control, ImagePrompt)]
    joined = _with_adapters(unet.params, [adapter.attention for adapter in adapters])
    return Network(ControlledUNet(module, controlnets), {"unet": joined, **params}, unet.config)


def _with_adapters(unet_params: Params, attention: Sequence[Params]) -> Params:
    """The UNet's parameters and the projections of each IP-Adapter, by its number."""
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(unet_params)
    for i, tree in enumerate(attention):
        projections: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(tree)
        flat |= {(*path[:-2], f"{path[-2]}_{i}", path[-1]): leaf for path, leaf in projections.items()}
    return traverse_util.unflatten_dict(flat)


def controlled(
    text: TextConditioning,
    negative: TextConditioning,
    controls: Sequence[AnyControl],
    image_size: ImageSize,
    timesteps: np.ndarray,
    num_steps: int,
) -> tuple[Controlled, Controlled]:
    """Conditioning with the images, and that of the unconditional branch, which an IP-Adapter's image is not in.

    image_size: of the samples, to which images are resized as diffusers' pipelines do. timesteps: of the calls.
    """
    n = len(text.hidden_states)
    of_nets = [control for control in controls if isinstance(control, Control)]
    images = tuple(_repeated(_pixels(control.image, image_size), n) for control in of_nets)
    scales = tuple(jnp.full(n, control.scale, jnp.float32) for control in of_nets)
    features = tuple(_features(c, image_size, timesteps, num_steps, n) for c in controls if isinstance(c, Adapter))
    prompts = [_image_tokens(control, n) for control in controls if isinstance(control, ImagePrompt)]
    shown, not_shown = (tuple(tokens[i] for tokens in prompts) for i in range(2))
    shared = images, scales, features
    return Controlled(text, *shared, shown), Controlled(negative, *shared, not_shown)


def _repeated(row: Array | np.ndarray, n: int) -> Array:
    """n examples of one."""
    return jnp.broadcast_to(row, (n, *row.shape[1:]))


def _pixels(image: Image.Image, image_size: ImageSize, channels: int = 3) -> Float[np.ndarray, "1 H W c"]:
    """In [0, 1]."""
    mode = "L" if channels == 1 else "RGB"
    pixels = resized(image.convert(mode), image_size, mode)
    return pixels.reshape(1, *image_size, channels).astype(np.float32) / 255


@partial(jax.jit, static_argnames=("module",))
def _applied(module: Any, params: Params, inputs: Any) -> Any:
    return module.apply({"params": params}, inputs)


def _features(
    control: Adapter, image_size: ImageSize, timesteps: np.ndarray, num_steps: int, n: int
) -> AdapterFeatures:
    """What an adapter adds, in the first ``factor`` of the steps."""
    module: Any = control.network.module
    pixels = _pixels(control.image, image_size, module.config.in_channels)
    maps = _applied(module, control.network.params, pixels)
    steps = int(num_steps * control.factor)
    last = timesteps[steps - 1] if steps else math.inf
    scaled = tuple(_repeated(control.scale * each, n) for each in maps)
    return AdapterFeatures(scaled, jnp.full(n, last, jnp.float32))


def _image_tokens(control: ImagePrompt, n: int) -> tuple[ImageTokens, ImageTokens]:
    """Of the image, and of an embedding of zeros, which diffusers guides away from."""
    adapter, scale = control.adapter, jnp.full(n, control.scale, jnp.float32)
    encoder: Any = adapter.encoder.module
    images = np.asarray(control.image.convert("RGB"))[None]
    pixels = adapter.preprocessor.for_tower(images, encoder.config.image_size)
    embedding = _applied(encoder, adapter.encoder.params, pixels)
    embeddings = jnp.concatenate([embedding, jnp.zeros_like(embedding)])
    tokens = _applied(adapter.projection, adapter.params, embeddings)
    return ImageTokens(_repeated(tokens[:1], n), scale), ImageTokens(_repeated(tokens[1:], n), scale)
