"""What is measured of a set of images, and the figures that come of it."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from mlcm_jax.evaluation.extractors.base import FeatureExtractor
from mlcm_jax.evaluation.metrics.base import Better, FeaturePair, ImageMetric, Metric
from mlcm_jax.evaluation.metrics.registry import IMAGE_METRICS, SET_METRICS
from mlcm_jax.evaluation.sampling import SampledBatch
from mlcm_jax.evaluation.statistics.bootstrap import Figure, mean_figure
from mlcm_jax.rewards.clip_features import ClipEncoder
from mlcm_jax.rewards.registry import REWARD_MODELS, kind_of
from mlcm_jax.types import Latents

Score = Callable[[UInt8[np.ndarray, "n H W 3"], Sequence[str]], Float[np.ndarray, " n"]]
Inputs = Mapping[str, Any]  # of a batch of images: by the names that ImageMetric.needs takes


@dataclasses.dataclass(frozen=True)
class Measurements:
    """Of a set of images. features: by extractor. numbers: by image metric, one an image (or a batch)."""

    features: Mapping[str, Float[np.ndarray, "n d"]]
    numbers: Mapping[str, Float[np.ndarray, " n"]]


@dataclasses.dataclass(frozen=True)
class Reference:
    """All of the baseline's reference sample: what the others, from the same noise, are compared with."""

    latents: Latents
    images: UInt8[np.ndarray, "n H W 3"]

    @classmethod
    def of(cls, batches: Sequence[SampledBatch]) -> "Reference":
        return cls(jnp.concatenate([b.latents for b in batches]), np.concatenate([b.images for b in batches]))


@dataclasses.dataclass(frozen=True)
class Networks:
    """clip: the encoder of --scorer. reward_models, extractors: by name, as many as were asked for."""

    clip: ClipEncoder
    reward_models: Mapping[str, Score]
    extractors: Mapping[str, FeatureExtractor]

    @cached_property
    def image_metrics(self) -> list[ImageMetric]:
        """The scores of the reward models, then the metrics of the registry."""
        return [*(score_metric(name, score) for name, score in self.reward_models.items()), *IMAGE_METRICS]

    def measure(self, batches: Iterable[Inputs]) -> Measurements:
        """Measure images batch by batch, so that few are in memory at a time."""
        features, numbers = [], []
        for batch in batches:
            inputs = {"clip": self.clip, **batch}
            features.append({name: extractor.extract(batch["images"]) for name, extractor in self.extractors.items()})
            numbers.append({m.name: m(inputs) for m in self.image_metrics if m.is_possible(inputs)})
        return Measurements(_concatenated(features), _concatenated(numbers))


def score_metric(name: str, score: Score) -> ImageMetric:
    """The metric of a reward model. name: of the registry, or NAME-LABEL."""
    _, _, label = name.partition("-")
    title = ", ".join(filter(None, (REWARD_MODELS[kind_of(name)].title, label)))
    return ImageMetric(f"{name}_score", title, "higher", 4, score, needs=("images", "prompts"))


def real_inputs(batches: Iterable[UInt8[np.ndarray, "n H W 3"]]) -> Iterator[Inputs]:
    """What ``Networks.measure`` takes, of real images."""
    return ({"images": images} for images in batches)


def sampled_inputs(
    batches: Iterable[SampledBatch], prompts: Sequence[str], reference: Reference | None
) -> Iterator[Inputs]:
    """The same of samples of ``prompts``. reference: what they are compared with, where there is one."""
    for batch in batches:
        inputs = {"images": batch.images, "latents": batch.latents, "prompts": prompts[batch.indices]}
        inputs["seconds"] = batch.seconds
        if reference:
            inputs["baseline_images"] = reference.images[batch.indices]
            inputs["baseline_latents"] = reference.latents[batch.indices]
        yield inputs


def _concatenated(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclasses.dataclass(frozen=True)
class Column:
    """Where a figure stands in a report. key: in results.json. against: "data", "baseline" or nothing ("")."""

    key: str
    title: str
    better: Better
    decimals: int
    against: str


def column(metric: Metric, against: str, features: str = "") -> Column:
    """The place of a metric's figure: NAME, or NAME/FEATURES/AGAINST such as precision/clip/data."""
    key = f"{metric.name}/{features}/{against}" if features else metric.name
    title = f"{metric.title}, {features}" if features else metric.title
    return Column(key, title, metric.better, metric.decimals, against)


def set_figures(pair: FeaturePair) -> dict[str, Figure]:
    """Figures of two sets of features, by metric."""
    return {metric.name: metric.compute(pair) for metric in SET_METRICS}


def relative_figures(
    metrics: Sequence[ImageMetric], samples: Measurements, data: Measurements, *, paired: bool
) -> dict[Column, Figure]:
    """Means over the real images' means; left out where one of those is not above 0 in all resamples."""
    found = {}
    for metric in metrics:
        if metric.relative_to_data:
            reference = mean_figure(data.numbers[metric.name], stream=0 if paired else 1)
            if reference.replicates.min() > 0:
                found[column(metric, "data", "pixels")] = mean_figure(samples.numbers[metric.name]).over(reference)
    return found


def figures(
    samples: Measurements,
    data: Measurements | None,
    baseline: Measurements | None,
    networks: Networks,
    *,
    data_matches_prompts: bool,
    num_resamples: int,
) -> dict[Column, Figure]:
    """All figures of a sampler, in the order in which they are reported: of independent features and of pixels first.

    data_matches_prompts: whether real image i is of prompt i.
    """
    references = {"data": (data, data_matches_prompts), "baseline": (baseline, True)}
    independent, dependent = {}, {}
    for name, extractor in networks.extractors.items():
        found = independent if extractor.spec.independent else dependent
        for against, (measured, paired) in references.items():
            if measured:
                features, components = (samples.features[name], measured.features[name]), extractor.spec.components
                computed = set_figures(FeaturePair(*features, paired, num_resamples, components))
                found |= {column(metric, against, name): computed[metric.name] for metric in SET_METRICS}
    metrics = networks.image_metrics
    relative = relative_figures(metrics, samples, data, paired=data_matches_prompts) if data else {}
    means = [m for m in metrics if not m.relative_to_data and m.name in samples.numbers]
    return (
        independent
        | relative
        | dependent
        | {column(metric, metric.against): mean_figure(samples.numbers[metric.name]) for metric in means}
    )
