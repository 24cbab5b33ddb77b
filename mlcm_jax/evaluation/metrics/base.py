"""What a metric is: one object that says what it needs, what it is computed of and how a report shows it.

A new metric is a file here that makes one of these objects, and its line in registry.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int

from mlcm_jax.evaluation.statistics.bootstrap import Figure, resampled_indices

Better = Literal["higher", "lower", "near 1"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """name: its key in results.json. title, decimals: in tables and plots. better: which figures are good ones."""

    name: str
    title: str
    better: Better
    decimals: int


@dataclasses.dataclass(frozen=True)
class ImageMetric(Metric):
    """One number for each image (or for each batch of them), reported as the mean.

    compute: takes, in this order, what ``needs`` names:

    - images, baseline_images: uint8 [n, H, W, 3]; baseline: the reference sample of the same index, from the same noise
    - latents, baseline_latents: scaled, float32
    - prompts: a list of n
    - clip: the ClipEncoder of --scorer
    - seconds: a float, the time of an image

    A metric is left out where something that it needs is not there. relative_to_data: it is computed of the real images
    as well, and reported as a part of their mean; it may need images alone.
    """

    compute: Callable[..., Float[np.ndarray, " n"]]
    needs: tuple[str, ...] = ("images",)
    relative_to_data: bool = False

    @property
    def against(self) -> str:
        """What an image is compared with: "data", "baseline" or nothing ("")."""
        if self.relative_to_data:
            return "data"
        return "baseline" if any(need.startswith("baseline_") for need in self.needs) else ""

    def is_possible(self, inputs: Mapping[str, Any]) -> bool:
        return set(self.needs) <= inputs.keys()

    def __call__(self, inputs: Mapping[str, Any]) -> Float[np.ndarray, " n"]:
        """The numbers of a batch. inputs: by the names of ``needs``."""
        return self.compute(*(inputs[need] for need in self.needs))


@dataclasses.dataclass(frozen=True)
class FeaturePair:
    """Features of a sampler's images and of a reference set.

    paired: example i of both is of the same prompt, so that they are resampled together. num_resamples: of distances,
    which take the longest. components: how many principal components of the reference the Frechet distance is taken in,
    the same ones for each set that is compared with it and in all resamples; None: all features.
    """

    samples: Float[np.ndarray, "n d"]
    reference: Float[np.ndarray, "m d"]
    paired: bool
    num_resamples: int
    components: int | None = None

    @property
    def reference_stream(self) -> int:
        """Stream of the reference's resamples, as ``resampled_indices`` takes it."""
        return 0 if self.paired else 1

    @cached_property
    def resamples(self) -> tuple[Int[np.ndarray, "b n"], Int[np.ndarray, "b m"]]:
        """Indices of the resamples of both sets."""
        return (
            resampled_indices(len(self.samples), self.num_resamples),
            resampled_indices(len(self.reference), self.num_resamples, stream=self.reference_stream),
        )


@dataclasses.dataclass(frozen=True)
class SetMetric(Metric):
    """Compares two sets of images in the features of each extractor. min_images: in each set."""

    compute: Callable[[FeaturePair], Figure]
    min_images: int = 2


@dataclasses.dataclass(frozen=True)
class SeedMetric(Metric):
    """One number for each prompt, of its images from several seeds, reported as the mean.

    compute: takes the projected image features of the CLIP of --scorer, [seeds, n, d].
    """

    needs: ClassVar[tuple[str, ...]] = ("clip",)

    compute: Callable[[Float[np.ndarray, "seeds n d"]], Float[np.ndarray, " n"]]
