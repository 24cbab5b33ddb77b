"""The evaluation as a whole: what is asked for, checked before anything is drawn; then drawn, measured, reported."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mlcm_jax.data.prompts import read_prompts
from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.diversity import diversity
from mlcm_jax.evaluation.extractors import EXTRACTORS, Extractor
from mlcm_jax.evaluation.measure import Judges, Measured, Reference, figures, look, mean_figure
from mlcm_jax.evaluation.precision_recall import NEIGHBOURS
from mlcm_jax.evaluation.provenance import provenance
from mlcm_jax.evaluation.real_images import RealPictures
from mlcm_jax.evaluation.report import Row, write_report
from mlcm_jax.evaluation.sampling import Artist, Drawn, check_samplers, pixels
from mlcm_jax.hub.pipeline import Pipeline, load_pipeline
from mlcm_jax.rewards.clip_features import image_features, load_scorer_once
from mlcm_jax.rewards.registry import SCORERS, kind_of, parse_places
from mlcm_jax.rng import next_seed
from mlcm_jax.sampling.sample import default_guidance_scale

NUM_EXAMPLES = 16  # in the grid


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags of launch/evaluate.py, which explains them."""

    model: str
    baseline: str | None
    steps: Sequence[str]
    reference_steps: int
    guidance_scale: float | None
    baseline_guidance_scale: float | None
    prompts: str
    num_images: int
    data: str | None
    data_matches_prompts: bool
    scorer: str
    scorers: Sequence[str]
    features: Sequence[str]
    diversity_prompts: int
    diversity_seeds: int
    resamples: int
    seed: int
    batch_size: int
    dtype: str
    architecture: str | None = None
    variant: str | None = None
    revision: str | None = None


def evaluate(settings: Settings, out: Path) -> str:
    """Draw, measure and write to ``out``; returns the tables. Raises UserError for settings that do not fit."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file: name a folder.")
    steps, prompts = step_counts(settings.steps), chosen_prompts(settings)
    judges = load_judges(settings)
    pipelines = load_pipelines(settings)
    check_samplers(pipelines, steps, settings.reference_steps)
    data = measured_data(settings, judges, pixels(pipelines["model"]))
    artists = make_artists(settings, pipelines, prompts)
    rows, reference = measure_all(settings, steps, prompts, judges, artists, data)
    about = provenance() | {"settings": dataclasses.asdict(settings)}
    return write_report(rows, reference, described_networks(settings, judges, data), about, out)


def step_counts(steps: Sequence[str]) -> list[int]:
    """The numbers of --steps, ascending; raises UserError for anything else."""
    try:
        return sorted({int(n) for n in steps})
    except ValueError:
        raise UserError(f"--steps={','.join(steps)} is no list of whole numbers: write one like 1,2,4.") from None


def chosen_prompts(settings: Settings) -> list[str]:
    """The first --num_images prompts; raises UserError when the file has fewer."""
    prompts = read_prompts(settings.prompts)
    if settings.num_images > len(prompts):
        raise UserError(
            f"--num_images={settings.num_images} is more than the {len(prompts)} prompts of {settings.prompts}: lower "
            "it."
        )
    return prompts[: settings.num_images]


def load_judges(settings: Settings) -> Judges:
    """The CLIP of --scorer, and what --scorers and --features name."""
    scorers = {"clip": settings.scorer} | parse_places("scorers", settings.scorers, list(SCORERS))
    features = parse_places("features", settings.features, list(EXTRACTORS)) or {"clip": settings.scorer}
    return Judges(
        clip=load_scorer_once(settings.scorer),
        scores={name: SCORERS[kind_of(name)](place) for name, place in scorers.items()},
        extractors={name: Extractor.read(kind_of(name), place) for name, place in features.items()},
    )


def described_networks(settings: Settings, judges: Judges, data: Measured | None) -> dict[str, str]:
    """What the networks of the report are, by the names that their figures have."""
    sizes = {"data": next(map(len, data.pixels.values()))} if data else {}
    sizes |= {"baseline": settings.num_images} if settings.baseline else {}
    found = {name: extractor.described(sizes) for name, extractor in judges.extractors.items()}
    if data:
        found["pixels"] = "no network; the mean over the pictures as a part of the real pictures' mean"
    places = {"clip": settings.scorer} | parse_places("scorers", settings.scorers, list(SCORERS))
    text_only = " (how well picture and prompt agree, not how good the picture looks)"
    found |= {f"{name}_score": place + text_only * (kind_of(name) == "clip") for name, place in places.items()}
    return found | {"perceptual distance, diversity": f"the image tower of {settings.scorer}"}


def load_pipelines(settings: Settings) -> dict[str, Pipeline]:
    """The model and, where there is one, the baseline."""
    folders = {"model": settings.model} | ({"baseline": settings.baseline} if settings.baseline else {})
    return {
        name: load_pipeline(
            folder,
            architecture=settings.architecture,
            variant=settings.variant if name == "model" else None,
            revision=settings.revision if name == "model" else None,
            dtype=jnp.dtype(settings.dtype),
        )
        for name, folder in folders.items()
    }


def make_artists(settings: Settings, pipelines: dict[str, Pipeline], prompts: list[str]) -> dict[str, Artist]:
    """Those who draw, each with its guidance."""
    given = {"model": settings.guidance_scale, "baseline": settings.baseline_guidance_scale}
    artists = {}
    for name, pipeline in pipelines.items():
        scale = given[name]
        scale = default_guidance_scale(pipeline) if scale is None else scale
        artists[name] = Artist(pipeline, prompts, name=name, guidance_scale=scale, batch_size=settings.batch_size)
    return artists


def measured_data(settings: Settings, judges: Judges, side: int) -> Measured | None:
    """The real pictures, at the size of those that are drawn; None without --data."""
    if settings.data is None:
        return None
    real, needed = RealPictures(settings.data, side), NEIGHBOURS + 1
    if settings.data_matches_prompts:
        needed = settings.num_images
    if len(real) < needed:
        raise UserError(f"--data={settings.data} has {len(real)} pictures: give {needed} or more.")
    n = needed if settings.data_matches_prompts else len(real)
    return judges.measure(real.batches(settings.batch_size, n))


class Bench:
    """Draws and measures one sampler after another; the reference, where there is one, comes first."""

    def __init__(self, settings: Settings, prompts: list[str], judges: Judges, data: Measured | None, progress: tqdm):
        self._settings, self._prompts, self._judges, self._data = settings, prompts, judges, data
        self._progress = progress
        self._reference: Reference | None = None
        self._reference_measured: Measured | None = None

    def measure(self, artist: Artist, num_steps: int, *, as_reference: bool = False) -> Row:
        """A row of the report; with ``as_reference``, later rows are compared with these pictures."""
        self._progress.set_description(f"{artist.name} {num_steps}")
        batches = self._drawn(artist, num_steps, seeds=[self._settings.seed], n=len(self._prompts))
        if as_reference:
            batches = list(batches)
            self._reference = Reference.of(batches)
        seen = look(batches, self._prompts, self._judges, self._reference, num_examples=NUM_EXAMPLES)
        if as_reference:
            self._reference_measured = seen.measured
        found = figures(
            seen,
            self._data,
            self._reference_measured,
            self._judges.extractors,
            data_matches_prompts=self._settings.data_matches_prompts,
            num_resamples=self._settings.resamples,
        )
        if self._settings.diversity_prompts:
            found["diversity"] = mean_figure(self._diversity(artist, num_steps))
        return Row(artist.name, num_steps, artist.scheduler, artist.guidance_scale, found, seen.examples)

    def _diversity(self, artist: Artist, num_steps: int) -> np.ndarray:
        n, first = diversity_prompts(self._settings), self._settings.seed
        seeds = [next_seed(first, by) for by in range(self._settings.diversity_seeds)]
        batches = self._drawn(artist, num_steps, seeds=seeds, n=n)
        features = np.concatenate([image_features(self._judges.clip, drawn.images) for drawn in batches])
        return diversity(features.reshape(len(seeds), n, -1))

    def _drawn(self, artist: Artist, num_steps: int, *, seeds: Sequence[int], n: int) -> Iterator[Drawn]:
        for drawn in artist.draw(num_steps, seeds=seeds, n=n):
            yield drawn
            self._progress.update(len(drawn.images))


def diversity_prompts(settings: Settings) -> int:
    """How many prompts are drawn from several seeds."""
    return min(settings.diversity_prompts, settings.num_images)


def measure_all(
    settings: Settings,
    steps: list[int],
    prompts: list[str],
    judges: Judges,
    artists: dict[str, Artist],
    data: Measured | None,
) -> tuple[list[Row], Row | None]:
    """A row for each sampler, and the reference's own: the baseline at --reference_steps."""
    samplers = [(name, n) for name in artists for n in steps]
    first = ("baseline", settings.reference_steps)
    if "baseline" in artists and first not in samplers:
        samplers.append(first)
    order = sorted(samplers, key=first.__ne__)  # the reference before the others, which keep their order
    pictures = len(order) * (len(prompts) + diversity_prompts(settings) * settings.diversity_seeds)
    with tqdm(total=pictures, unit="picture") as progress:
        bench = Bench(settings, prompts, judges, data, progress)
        rows = {(name, n): bench.measure(artists[name], n, as_reference=(name, n) == first) for name, n in order}
    return [rows[sampler] for sampler in samplers], rows.get(first)
