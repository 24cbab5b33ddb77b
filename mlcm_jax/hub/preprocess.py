"""Images as a CLIP image tower takes them, by transformers' preprocessor_config.json (CLIPImageProcessor)."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from mlcm_jax.errors import UserError
from mlcm_jax.hub.load import read_json
from mlcm_jax.json_config import MAPPING, POSITIVE, SIZE, UNREAD, Kind, Table, either, is_number, is_size, read_config


def three(name: str, each: Callable[[Any], bool]) -> Kind:
    """A number for each colour."""
    return Kind(f"three {name}", lambda v: isinstance(v, tuple) and len(v) == 3 and all(map(each, v)))


EXTENT = either(SIZE, MAPPING)
MEANS = three("numbers", is_number)
DEVIATIONS = three("numbers above 0", POSITIVE.holds)
# The network is an image tower for RGB: what would change its input in another way than below is refused.
KEYS: Table = {
    "image_processor_type": (None, (None, "CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")),
    "feature_extractor_type": (None, (None, "CLIPFeatureExtractor")),
    "processor_class": (None, UNREAD),
    "do_resize": (True, (True, False)),
    "size": ({"shortest_edge": 224}, EXTENT),
    "resample": (3, tuple(int(r) for r in Image.Resampling)),
    "do_center_crop": (True, (True, False)),
    "crop_size": ({"height": 224, "width": 224}, EXTENT),
    "do_rescale": (True, (True,)),
    "rescale_factor": (1 / 255, POSITIVE),
    "do_normalize": (True, (True,)),
    "image_mean": ((0.48145466, 0.4578275, 0.40821073), MEANS),
    "image_std": ((0.26862954, 0.26130258, 0.27577711), DEVIATIONS),
    "do_convert_rgb": (True, (True, False, None)),  # images are RGB already
    "do_pad": (None, (None, False)),
    "default_to_square": (None, (None, False)),  # whether a size that is one number means a square
    **dict.fromkeys(("data_format", "input_data_format", "return_tensors", "device"), (None, UNREAD)),
    **dict.fromkeys(("disable_grouping", "pad_size"), (None, UNREAD)),
}
Size = tuple[int, int]  # height, width in pixels
# PIL's filters that JAX has; both widen them when images shrink, and both have Keys' cubic at a = -0.5
JAX_FILTERS = {
    Image.Resampling.NEAREST: "nearest",
    Image.Resampling.LANCZOS: "lanczos3",
    Image.Resampling.BILINEAR: "linear",
    Image.Resampling.BICUBIC: "cubic",
}


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """Resize, crop about the centre, scale and normalise; a step whose size is None is left out.

    resize: pixels of the shorter side (an int), or height and width. resample: PIL's number of the filter.
    """

    resize: int | Size | None
    crop: Size | None
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Preprocessor":
        """Read preprocessor_config.json; raises UserError for a key or a value that is not supported."""
        path = Path(folder) / "preprocessor_config.json"
        values = read_config(read_json(path), KEYS, "CLIPImageProcessor", file_name=path.name)
        resize = _size("size", values["size"]) if values["do_resize"] else None
        crop = _size("crop_size", values["crop_size"]) if values["do_center_crop"] else None
        return cls(
            resize=resize,
            crop=(crop, crop) if isinstance(crop, int) else crop,
            resample=values["resample"],
            scale=values["rescale_factor"],
            mean=values["image_mean"],
            std=values["image_std"],
        )

    def __call__(self, images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n h w 3"]:
        """Float32 pixels for the tower; raises UserError for images that are smaller than the crop."""
        pixels = images
        if self.resize is not None:
            height, width = self._resized(*images.shape[1:3])
            pixels = np.stack([self._resample(image, height, width) for image in images])
        if self.crop is not None:
            pixels = self._cropped(pixels)
        normalised = (pixels.astype(np.float32) * self.scale - np.asarray(self.mean)) / np.asarray(self.std)
        return normalised.astype(np.float32)

    def for_tower(self, images: UInt8[np.ndarray, "n H W 3"], side: int) -> Float[np.ndarray, "n h w 3"]:
        """The same for a tower that takes squares of ``side`` pixels; raises UserError for images that come out at
        another size."""
        pixels = self(images)
        if pixels.shape[1:3] != (side, side):
            raise UserError(
                f"The images come out at {pixels.shape[1]} x {pixels.shape[2]} pixels, but the CLIP takes {side} x "
                f"{side}: give square images, or a preprocessor_config.json that crops them."
            )
        return pixels

    def differentiable(self, images: Float[Array, "n H W 3"]) -> Float[Array, "n h w 3"]:
        """The same for float images in [-1, 1], clipped to them, as a function that JAX can differentiate.

        PIL rounds to 8 bits after each direction of a resize, JAX does not: pixels differ by 2/255 at most. Raises
        UserError for images that are smaller than the crop and for a filter that JAX does not have.
        """
        if self.resample not in JAX_FILTERS:
            raise UserError(
                f"preprocessor_config.json has resample={self.resample}: use {[int(f) for f in JAX_FILTERS]}."
            )
        pixels = jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)
        if self.resize is not None:
            (n, rows, columns, _), method = pixels.shape, JAX_FILTERS[Image.Resampling(self.resample)]
            height, width = self._resized(rows, columns)
            for shape in ((n, rows, width, 3), (n, height, width, 3)):  # PIL's order; it clips after each
                pixels = jnp.clip(jax.image.resize(pixels, shape, method), 0, 1)
        if self.crop is not None:
            pixels = self._cropped(pixels)
        return (pixels * (255 * self.scale) - jnp.asarray(self.mean)) / jnp.asarray(self.std)

    def _resized(self, height: int, width: int) -> Size:
        if not isinstance(self.resize, int):
            return self.resize or (height, width)
        shorter = min(height, width)
        return int(height * self.resize / shorter), int(width * self.resize / shorter)

    def _resample(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling(self.resample)))

    def _cropped(self, pixels: Any) -> Any:
        (height, width), (crop_height, crop_width) = pixels.shape[1:3], self.crop or pixels.shape[1:3]
        if crop_height > height or crop_width > width:
            raise UserError(
                f"Images of {height} x {width} pixels are smaller than the preprocessor's crop of {crop_height} x "
                f"{crop_width}: use larger images or a preprocessor_config.json that resizes them."
            )
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        return pixels[:, top : top + crop_height, left : left + crop_width]


def clip_preprocessor(side: int) -> Preprocessor:
    """What OpenAI's towers for squares of ``side`` pixels take, open_clip's and BLIP's too."""
    mean, std = KEYS["image_mean"][0], KEYS["image_std"][0]
    return Preprocessor(side, (side, side), int(Image.Resampling.BICUBIC), 1 / 255, mean, std)


CLIP_224 = clip_preprocessor(224)


def _size(key: str, value: Any) -> int | Size:
    """A size as any version of transformers writes it: a number, {"shortest_edge"} or {"height", "width"}."""
    sides = value if isinstance(value, Mapping) else {"shortest_edge": value}
    if all(map(is_size, sides.values())):
        if set(sides) == {"shortest_edge"}:
            return sides["shortest_edge"]
        if set(sides) == {"height", "width"}:
            return sides["height"], sides["width"]
    raise UserError(
        f"preprocessor_config.json has {key}={value!r}, which is not supported: use a number of pixels, "
        "shortest_edge, or height and width."
    )
