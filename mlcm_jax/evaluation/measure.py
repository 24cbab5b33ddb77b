"""What an evaluation measures: of each sampler's pictures by themselves, against real ones and the baseline's."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from mlcm_jax.evaluation.background import background_noise
from mlcm_jax.evaluation.bootstrap import counts, interval, mean_replicates, replicates, resampled_rows
from mlcm_jax.evaluation.extractors import Extractor
from mlcm_jax.evaluation.frechet import frechet_distance
from mlcm_jax.evaluation.high_frequency import high_frequency_energy
from mlcm_jax.evaluation.kid import Kernels
from mlcm_jax.evaluation.noise_level import noise_level
from mlcm_jax.evaluation.perceptual import perceptual_distance
from mlcm_jax.evaluation.precision_recall import precision_recall
from mlcm_jax.evaluation.principal_components import PrincipalComponents
from mlcm_jax.evaluation.sampling import Drawn
from mlcm_jax.rewards.clip_features import Scorer
from mlcm_jax.rewards.registry import Score
from mlcm_jax.sampling.sample import latent_distance
from mlcm_jax.types import Latents

MEAN_RESAMPLES = 2000
FeatureSets = Mapping[str, Float[np.ndarray, "n d"]]  # by the extractor's name
# name: one number a picture, of its pixels alone. No network is asked; the mean over real pictures is the reference.
PIXEL_METRICS: dict[str, Callable[[UInt8[np.ndarray, "n H W 3"]], Float[np.ndarray, " n"]]] = {
    "high_frequency_energy": high_frequency_energy,
    "noise_level": noise_level,
    "background_noise": background_noise,
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """A set of pictures. features: by extractor. pixels: by pixel metric, one number a picture."""

    features: FeatureSets
    pixels: Mapping[str, Float[np.ndarray, " n"]]


@dataclasses.dataclass(frozen=True)
class Judges:
    """clip: of perceptual distance and diversity. scores, extractors: by name, as many as were asked for."""

    clip: Scorer
    scores: Mapping[str, Score]
    extractors: Mapping[str, Extractor]

    def measure(self, batches: Iterable[UInt8[np.ndarray, "n H W 3"]]) -> Measured:
        """Features and pixel metrics of pictures, batch by batch, so that few are in memory at a time."""
        features, pixels = [], []
        for images in batches:
            features.append({name: extractor.extract(images) for name, extractor in self.extractors.items()})
            pixels.append({name: metric(images) for name, metric in PIXEL_METRICS.items()})
        return Measured(joined(features), joined(pixels))


@dataclasses.dataclass(frozen=True)
class Reference:
    """All of the baseline's long result: what the others, from the same noise, are compared with."""

    latents: Latents
    images: UInt8[np.ndarray, "n H W 3"]

    @classmethod
    def of(cls, batches: Sequence[Drawn]) -> "Reference":
        return cls(jnp.concatenate([b.latents for b in batches]), np.concatenate([b.images for b in batches]))


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is kept of a sampler's pictures. numbers: by metric, one a picture or batch. examples: the first."""

    measured: Measured
    numbers: dict[str, Float[np.ndarray, " n"]]
    examples: UInt8[np.ndarray, "k H W 3"]


def look(
    batches: Iterable[Drawn],
    prompts: Sequence[str],
    judges: Judges,
    reference: Reference | None,
    *,
    num_examples: int,
) -> Seen:
    """Judge pictures batch by batch, so that few are in memory at a time."""
    numbers, examples = [], []

    def judged(drawn: Drawn) -> UInt8[np.ndarray, "n H W 3"]:
        mine = {f"{name}_score": score(drawn.images, prompts[drawn.rows]) for name, score in judges.scores.items()}
        if reference:
            mine["latent_mse"] = latent_distance(drawn.latents, reference.latents[drawn.rows])
            mine["perceptual_distance"] = perceptual_distance(judges.clip, drawn.images, reference.images[drawn.rows])
        numbers.append(mine | {"seconds_per_image": np.array([drawn.seconds])})
        examples.append(drawn.images[: max(0, num_examples - drawn.rows.start)])
        return drawn.images

    measured = judges.measure(judged(drawn) for drawn in batches)
    return Seen(measured, joined(numbers), np.concatenate(examples))


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Batches of named arrays as whole ones."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number, and what it is in resamples of the pictures."""

    value: float
    replicates: Float[np.ndarray, " b"]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval."""
        return interval(self.value, self.replicates)

    def over(self, other: "Figure") -> "Figure":
        """The ratio to another sampler's figure, paired: both are resampled alike."""
        mine, others = (f.replicates - f.replicates.mean() + f.value for f in (self, other))
        return Figure(self.value / other.value, mine / others)


def mean_figure(values: Float[np.ndarray, " n"], *, stream: int = 0) -> Figure:
    """Mean of one number a picture. stream: as ``resampled_rows`` takes it."""
    rows = resampled_rows(len(values), MEAN_RESAMPLES, stream=stream)
    return Figure(float(np.mean(values, dtype=np.float64)), mean_replicates(values, rows))


def set_figures(
    drawn: Float[np.ndarray, "n d"],
    other: Float[np.ndarray, "m d"],
    *,
    paired: bool,
    num_resamples: int,
    components: int | None = None,
) -> dict[str, Figure]:
    """Figures of two sets of features: Frechet and kernel distance, precision and recall.

    paired: row i of both is of the same prompt, so that they are resampled together. For precision and recall only the
    pictures that are counted are resampled, not those that they are sought among: repeated rows would shrink the
    distances to neighbours. num_resamples: of the distances, which take the longest. components: the Frechet distance
    is taken in so many principal components of ``other``, the same ones for each set that is compared with it and in
    all resamples; None: in all features.
    """
    stream = 0 if paired else 1
    rows, other_rows = (
        resampled_rows(len(drawn), num_resamples),
        resampled_rows(len(other), num_resamples, stream=stream),
    )
    kernels = Kernels.of(drawn, other, paired=paired)
    project = PrincipalComponents.of(other, components) if components else np.asarray
    seen, reference = project(drawn), project(other)

    def frechet(chosen, others):
        return frechet_distance(seen[chosen], reference[others])

    covered = precision_recall(drawn, other)
    recalled = resampled_rows(len(other), MEAN_RESAMPLES, stream=stream)
    return {
        "frechet_distance": Figure(frechet_distance(seen, reference), replicates(frechet, rows, other_rows)),
        "kernel_distance": Figure(float(kernels.distance()), kernels.distance(counts(rows), counts(other_rows))),
        "precision": mean_figure(covered.precise),
        "recall": Figure(float(covered.recalled.mean()), mean_replicates(covered.recalled, recalled)),
    }


def pixel_figures(drawn: Measured, real: Measured, *, paired: bool) -> dict[str, Figure]:
    """Each pixel metric's mean over the real pictures' mean; left out where that is not above 0 in all resamples."""
    stream = 0 if paired else 1
    found = {}
    for name, values in drawn.pixels.items():
        reference = mean_figure(real.pixels[name], stream=stream)
        if reference.replicates.min() > 0:
            found[f"{name}/pixels/data"] = mean_figure(values).over(reference)
    return found


def figures(
    seen: Seen,
    data: Measured | None,
    baseline: Measured | None,
    extractors: Mapping[str, Extractor],
    *,
    data_matches_prompts: bool,
    num_resamples: int,
) -> dict[str, Figure]:
    """All figures of a sampler, in the order in which they are reported: of independent features and of pixels first.

    Those of sets are named METRIC/EXTRACTOR/REFERENCE, such as precision/clip/data, those of pixels METRIC/pixels/data.
    data_matches_prompts: whether row i of ``data`` is a real picture of prompt i.
    """
    references = {"data": (data, data_matches_prompts), "baseline": (baseline, True)}
    independent, others = {}, {}
    for name, extractor in extractors.items():
        found = independent if extractor.kind.independent else others
        for reference, (measured, paired) in references.items():
            if measured:
                compared = set_figures(
                    seen.measured.features[name],
                    measured.features[name],
                    paired=paired,
                    num_resamples=num_resamples,
                    components=extractor.kind.components,
                )
                found |= {f"{metric}/{name}/{reference}": figure for metric, figure in compared.items()}
    pixels = pixel_figures(seen.measured, data, paired=data_matches_prompts) if data else {}
    return independent | pixels | others | {name: mean_figure(values) for name, values in seen.numbers.items()}
