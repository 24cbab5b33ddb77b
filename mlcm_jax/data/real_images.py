"""Real images to compare with: a folder of image files, or one array of images."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mlcm_jax.data.npy import read_npy
from mlcm_jax.errors import UserError
from mlcm_jax.image_size import ImageSize, both
from mlcm_jax.images import open_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class RealImages:
    """Images of one size, read as they are asked for. image_size: in pixels, a square's side, or height and width.

    place: a folder of .png, .jpg or .webp files, or an .npy file, uint8 [n, H, W, 3], which is not read whole. Images
    of another size are cropped about the centre to its proportions and resized (Lanczos). Raises UserError for a place
    that holds no images.
    """

    def __init__(self, place: str | Path, image_size: int | ImageSize):
        place = Path(place)
        if not place.exists():
            raise UserError(f"{place} does not exist: name a folder of images or an .npy file of them.")
        self._images, self._size = _files(place) if place.is_dir() else _array(place), both(image_size)

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, size: int, n: int) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """The first n images, ``size`` at a time; raises UserError for a file that is not an image."""
        for start in range(0, n, size):
            yield np.stack([_fitted(_opened(one), self._size) for one in self._images[start : min(start + size, n)]])


def _files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{folder} holds no images: name a folder of {', '.join(SUFFIXES)} files.")
    return files


def _array(file: Path) -> np.ndarray:
    array = read_npy(file, mmap=True)
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8:
        raise UserError(f"{file} holds {array.dtype} {list(array.shape)}: it must be one array, uint8 [n, H, W, 3].")
    return array


def _opened(one: Path | np.ndarray) -> Image.Image:
    return open_image(one) if isinstance(one, Path) else Image.fromarray(one)


def _fitted(image: Image.Image, size: ImageSize) -> UInt8[np.ndarray, "H W 3"]:
    height, width = size
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        kept = round(width * scale), round(height * scale)
        left, top = ((whole - part) // 2 for whole, part in zip(image.size, kept, strict=True))
        box = (left, top, left + kept[0], top + kept[1])
        image = image.crop(box).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image)
