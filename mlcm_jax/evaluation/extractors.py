"""The networks in whose features sets of pictures are compared, by name."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from mlcm_jax.evaluation.clip_features import image_features, load_scorer_once
from mlcm_jax.evaluation.inception_features import load_inception

Extract = Callable[[UInt8[np.ndarray, "n H W 3"]], Float[np.ndarray, "n d"]]


def load_clip_features(folder: str | Path) -> Extract:
    """The projected image embeddings of a transformers CLIPModel folder: those of CLIP-FID (arXiv 2203.06026).

    Raises UserError for an unsupported setting, unfit weights and a missing preprocessor_config.json.
    """
    return partial(image_features, load_scorer_once(folder))


# name: what reads its folder or file
EXTRACTORS: dict[str, Callable[[str], Extract]] = {
    "clip": load_clip_features,
    "inception": load_inception,
}
