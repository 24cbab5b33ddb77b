"""A text feature of a data set that TensorFlow Datasets has prepared as ArrayRecord, read without TensorFlow."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.read_only_builder import builder_from_directory, builder_from_files
from tensorflow_datasets.core.registered import DatasetNotFoundError

from mlcm_jax.data.columns import choose_column
from mlcm_jax.errors import UserError, shortened

DEFAULT_SPLIT = "train"
_PLACE = re.compile(r"(?P<name>.+?)(:(?P<split>[a-zA-Z_]\w*(\[[^\]]*\])?))?")


class TfdsText:
    """Rows of a split, read from disk as they are asked for; a row whose feature is a sequence has several texts.

    place: NAME, as tfds takes it (coco_captions, coco_captions/2014:1.1.0) or the folder of a prepared
    version, and :SPLIT where it is not train (:validation, :train[:1000]). column: path of the feature, such as
    captions/text. Data sets are looked for where tfds keeps them, the variable TFDS_DATA_DIR.

    Raises UserError for a data set that is not prepared as ArrayRecord, an unknown split and an unknown feature.
    """

    def __init__(self, place: str, column: str):
        match = _PLACE.fullmatch(place)
        if match is None:
            raise UserError("tfds: names no data set: write tfds:NAME or tfds:NAME:SPLIT.")
        builder, said = _prepared(match["name"]), f"tfds:{place}"
        features = builder.info.features
        paths = {"/".join(path): path for path in _text_features(features)}
        self._path = paths[choose_column(said, sorted(paths), column)]
        split = match["split"] or DEFAULT_SPLIT
        if split.partition("[")[0] not in builder.info.splits:
            known = ", ".join(builder.info.splits)
            raise UserError(f"{said} has no split {split!r}: it has {known}; write tfds:NAME:SPLIT.")
        skipped = {name: _skip(feature) for name, feature in features.items() if name != self._path[0]}
        try:
            self._source = builder.as_data_source(split, decoders=skipped)
        except (NotImplementedError, ValueError) as e:
            raise UserError(f"{said} cannot be read ({shortened(e)}).") from None
        if not len(self._source):
            raise UserError(f"{said} is empty: name another split.")

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, rows: Sequence[int]) -> list[Sequence[str]]:
        return [self._texts(example) for example in self._source.__getitems__([int(row) for row in rows])]

    def _texts(self, example: Any) -> Sequence[str]:
        for name in self._path:
            example = example[name]
        decoded = [text.decode().strip() for text in np.ravel(np.asarray(example, object))]
        return [text for text in decoded if text] or [""]


def _prepared(name: str) -> Any:
    is_folder = (epath.Path(name) / "dataset_info.json").exists()
    try:
        return builder_from_directory(name) if is_folder else builder_from_files(name)
    except (DatasetNotFoundError, ValueError):
        raise UserError(
            f"No data set {name} is prepared in tfds's folder: run `tfds build {name} --file_format=array_record`, or "
            "point TFDS_DATA_DIR to where it is."
        ) from None


def _text_features(feature: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Keys that lead to the text features; a key may itself hold a "/"."""
    if isinstance(feature, tfds.features.Text):
        yield path
    elif isinstance(feature, tfds.features.Sequence):
        yield from _text_features(feature.feature, path)
    elif isinstance(feature, tfds.features.FeaturesDict):
        for name, inner in feature.items():
            yield from _text_features(inner, (*path, name))


def _skip(feature: Any) -> Any:
    """What keeps tfds from decoding a feature, images above all; without TensorFlow sequences are always decoded."""
    if isinstance(feature, tfds.features.Sequence):
        return None
    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: _skip(inner) for name, inner in feature.items()}
    return tfds.decode.SkipDecoding()
