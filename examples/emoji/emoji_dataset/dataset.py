"""The TensorFlow Datasets builder of the emoji images, and the reader that the trainers use.

Neither needs TensorFlow: the records are ArrayRecord files and the features are plain tensors and text.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from mlcm_jax.errors import UserError
from mlcm_jax.images import open_image

from .names import is_held_out, read_emojis
from .sources import SOURCES, names_file

IMAGE_SIZE = 64
SPLITS = ("train", "heldout")
TEXT_FEATURES = ("caption", "name", "style", "skin_tone", "category")


class EmojiSplit(TypedDict):
    """A whole split in memory; row i of every entry describes the same image."""

    image: UInt8[np.ndarray, "n 64 64 3"]
    caption: list[str]
    name: list[str]
    style: list[str]
    skin_tone: list[str]
    category: list[str]


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Emoji drawn in three styles, each 64 px image with a caption."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Run examples/emoji/build_data.py, which fetches the packages with npm."
    # Inferring it, for a class inside a package, takes importlib_resources, which tfds does not install.
    code_path = epath.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        texts = {feature: tfds.features.Text() for feature in TEXT_FEATURES}
        image = tfds.features.Tensor(shape=(IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Noto, Twemoji and Fluent emoji at 64 px on white, with English captions.",
            features=tfds.features.FeaturesDict({"image": image, **texts}),
            supervised_keys=None,
            homepage="https://github.com/iamcal/emoji-data",
            license="Noto Emoji: Apache-2.0; Twemoji graphics: CC-BY 4.0; Fluent Emoji: MIT",
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        packages_dir = Path(dl_manager.manual_dir)
        return {split: self._generate_examples(packages_dir, split == "heldout") for split in SPLITS}

    def _generate_examples(self, packages_dir: Path, held_out: bool) -> Iterator[tuple[str, dict]]:
        emojis = [emoji for emoji in read_emojis(names_file(packages_dir)) if is_held_out(emoji.name) == held_out]
        for source in SOURCES:
            files = source.image_files(packages_dir)
            for emoji in emojis:
                if emoji.key not in files:
                    continue
                example = {
                    "image": read_image(files[emoji.key]),
                    "caption": emoji.caption(source.style),
                    "name": emoji.name,
                    "style": source.style,
                    "skin_tone": emoji.skin_tone,
                    "category": emoji.category,
                }
                yield f"{source.style}/{emoji.key}", example


def read_image(path: Path) -> UInt8[np.ndarray, "64 64 3"]:
    """An image composited on white, padded to a square and resized (Lanczos) to 64 px."""
    image = open_image(path, "RGBA")
    side = max(image.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(canvas.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))


def build(data_dir: Path, packages_dir: Path) -> None:
    """Write both splits below `data_dir`; a finished build there is kept as it is."""
    builder = Emoji(data_dir=str(data_dir), file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=str(packages_dir))
    builder.download_and_prepare(download_config=config)


def load_split(data_dir: str | Path, split: str) -> EmojiSplit:
    """Read one split, "train" or "heldout", whole: about 12 KiB an image.

    Raises:
        UserError: the split is neither of the two, or `data_dir` holds no finished build.
    """
    if split not in SPLITS:
        raise UserError(f"The emoji data has no split {split!r}: choose one of {', '.join(SPLITS)}.")
    builder = Emoji(data_dir=str(data_dir), file_format="array_record")
    if not builder.is_prepared():
        raise UserError(f"No emoji data in {data_dir}: run examples/emoji/build_data.py --data_dir={data_dir} first.")
    source = builder.as_data_source(split)
    rows = source.__getitems__(range(len(source)))
    texts = {feature: [row[feature].decode() for row in rows] for feature in TEXT_FEATURES}
    return EmojiSplit(image=np.stack([row["image"] for row in rows]), **texts)
