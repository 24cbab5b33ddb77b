"""The TensorFlow Datasets builder of MSCOCO 2017's validation images with their captions (arXiv 1405.0312).

tfds has COCO's captions for 2014 alone, and its 2017 data without captions. No TensorFlow is needed: the records are
ArrayRecord files, and the JPEG files are kept as they are.
"""

import json
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

SITE = "http://images.cocodataset.org"
ARCHIVES = {"images": "zips/val2017.zip", "annotations": "annotations/annotations_trainval2017.zip"}
CAPTIONS = "annotations/captions_val2017.json"


class CocoCaptions2017(tfds.core.GeneratorBasedBuilder):
    """5,000 images, five captions or more each; about 1.1 GB to download."""

    VERSION = tfds.core.Version("1.0.0")
    # Inferring it, for a class outside tfds, takes importlib_resources, which tfds does not install.
    code_path = epath.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image_id": tfds.features.Scalar(dtype=np.int64),
            "captions": tfds.features.Sequence(tfds.features.Text()),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="MSCOCO 2017: the validation images and their captions.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=None,
            homepage="https://cocodataset.org",
            license="Annotations: CC-BY 4.0; images: as their owners on Flickr say",
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        archives = dl_manager.download({name: f"{SITE}/{path}" for name, path in ARCHIVES.items()})
        return {"validation": self._generate_examples(Path(archives["images"]), Path(archives["annotations"]))}

    def _generate_examples(self, images: Path, annotations: Path) -> Iterator[tuple[int, dict]]:
        with zipfile.ZipFile(annotations) as archive:
            found = json.loads(archive.read(CAPTIONS))
        captions = defaultdict(list)
        for annotation in sorted(found["annotations"], key=_number):
            captions[annotation["image_id"]].append(" ".join(annotation["caption"].split()))
        with zipfile.ZipFile(images) as archive:
            for entry in sorted(found["images"], key=_number):
                jpeg = archive.read(f"val2017/{entry['file_name']}")
                number = entry["id"]
                yield number, {"image": jpeg, "image_id": number, "captions": captions[number]}


def _number(entry: dict) -> int:
    return entry["id"]
