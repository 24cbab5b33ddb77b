"""What a feature extractor is: a network in whose features sets of images are compared.

A new one is a file here that makes an ``ExtractorSpec``, and its line in registry.py.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, UInt8

from mlcm_jax.evaluation.statistics.principal_components import num_components

Extract = Callable[[UInt8[np.ndarray, "n H W 3"]], Float[np.ndarray, "n d"]]

PHOTOGRAPHS = "labelled photographs (ImageNet)"


@dataclasses.dataclass(frozen=True)
class ExtractorSpec:
    """A kind of feature extractor: what the registry holds.

    name: in flags and in the keys of figures. load: reads its folder or file; raises UserError for an unfit one.
    trained_on: what the network has seen. independent: of any text. components: how many of the reference set's
    principal components the Frechet distance is computed in, at most; None: in all features, as FID and CLIP-FID are
    defined.
    """

    name: str
    load: Callable[[str], Extract]
    trained_on: str
    independent: bool
    components: int | None = None


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """A network that was read, and where from."""

    spec: ExtractorSpec
    place: str
    extract: Extract

    def describe(self, sizes: Mapping[str, int]) -> str:
        """A line for a report. sizes: of the reference sets, by name."""
        about = f"{self.place}, trained on {self.spec.trained_on}"
        if self.spec.components is None or not sizes:
            return about
        used = [f"{num_components(n, self.spec.components)} of {name}" for name, n in sizes.items()]
        return f"{about}; Frechet distance in the first principal components of the reference set: {', '.join(used)}"
