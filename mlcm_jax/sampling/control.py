"""Sampling with ControlNets: a UNet that they add to, and its conditioning with the images that they follow."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from PIL import Image

from mlcm_jax.hub.pipeline import Network
from mlcm_jax.image_size import ImageSize
from mlcm_jax.images import resized
from mlcm_jax.models.controlnet import Controlled, ControlledUNet
from mlcm_jax.types import TextConditioning


class Control(NamedTuple):
    """network: of hub.controlnet. image: what it follows, such as edges, of any size. scale: of what it adds."""

    network: Network
    image: Image.Image
    scale: float = 1.0


def controlled_unet(unet: Network, controls: Sequence[Control]) -> Network:
    """The UNet with its ControlNets, whose conditioning ``controlled`` makes."""
    module: Any = unet.module
    controlnets: Any = tuple(control.network.module for control in controls)
    params = {f"controlnets_{i}": control.network.params for i, control in enumerate(controls)}
    return Network(ControlledUNet(module, controlnets), {"unet": unet.params, **params}, unet.config)


def controlled(text: TextConditioning, controls: Sequence[Control], image_size: ImageSize) -> Controlled:
    """A text's conditioning with the images at the size of the samples, resized as diffusers' pipelines do."""
    n, images, scales = len(text.hidden_states), [], []
    for control in controls:
        image = resized(control.image, image_size).astype(np.float32) / 255
        images.append(jnp.broadcast_to(image, (n, *image.shape)))
        scales.append(jnp.full(n, control.scale, jnp.float32))
    return Controlled(text, tuple(images), tuple(scales))
