"""The networks in whose features sets of pictures are compared, by name."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from mlcm_jax.evaluation.inception_features import load_inception
from mlcm_jax.evaluation.principal_components import num_components
from mlcm_jax.rewards.clip_features import image_features, load_scorer_once
from mlcm_jax.rewards.efficientnet_features import load_efficientnet

Extract = Callable[[UInt8[np.ndarray, "n H W 3"]], Float[np.ndarray, "n d"]]


def load_clip_features(folder: str | Path) -> Extract:
    """The projected image embeddings of a transformers CLIPModel folder: those of CLIP-FID (arXiv 2203.06026).

    Raises UserError for an unsupported setting, unfit weights and a missing preprocessor_config.json.
    """
    return partial(image_features, load_scorer_once(folder))


class ExtractorKind(NamedTuple):
    """load: reads its folder or file. learnt_from: what the network has seen. independent: of any text.

    components: how many of the reference set's principal components the Frechet distance is computed in, at most; None:
    in all features, as FID and CLIP-FID are defined.
    """

    load: Callable[[str], Extract]
    learnt_from: str
    independent: bool
    components: int | None = None


PHOTOGRAPHS = "labelled photographs (ImageNet)"
EXTRACTORS = {
    "efficientnet": ExtractorKind(load_efficientnet, PHOTOGRAPHS, independent=True, components=256),
    "inception": ExtractorKind(load_inception, PHOTOGRAPHS, independent=True),
    "clip": ExtractorKind(
        load_clip_features, "pictures with captions: agreement with the text, not looks", independent=False
    ),
}


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A network that was read, and where from."""

    kind: ExtractorKind
    place: str
    extract: Extract

    @classmethod
    def read(cls, name: str, place: str) -> "Extractor":
        """name: a key of ``EXTRACTORS``. Raises UserError as the network's loader does."""
        kind = EXTRACTORS[name]
        return cls(kind, place, kind.load(place))

    def described(self, sizes: Mapping[str, int]) -> str:
        """A line for a report. sizes: of the sets that are compared with, by name."""
        about = f"{self.place}, learnt from {self.kind.learnt_from}"
        if self.kind.components is None or not sizes:
            return about
        used = [f"{num_components(n, self.kind.components)} of {name}" for name, n in sizes.items()]
        return (
            f"{about}; Frechet distance in the first principal components of what is compared with: {', '.join(used)}"
        )
