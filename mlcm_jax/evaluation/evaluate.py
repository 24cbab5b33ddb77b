"""The evaluation as a whole: what is asked for, checked before anything is sampled; then samples, figures, a report."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from mlcm_jax.data.prompts import read_prompts
from mlcm_jax.data.real_images import RealImages
from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.evaluator import EvaluationProtocol, evaluate_samplers
from mlcm_jax.evaluation.extractors.registry import FEATURE_EXTRACTORS, load_extractor
from mlcm_jax.evaluation.measure import Measurements, Networks, real_inputs
from mlcm_jax.evaluation.metrics.registry import IMAGE_METRICS, SEED_METRICS, SET_METRICS
from mlcm_jax.evaluation.provenance import provenance
from mlcm_jax.evaluation.report import write_report
from mlcm_jax.evaluation.sampling import Sampler, check_samplers
from mlcm_jax.hub.pipeline import Pipeline, load_pipeline
from mlcm_jax.image_size import ImageSize, asked_size
from mlcm_jax.outputs import check_folder
from mlcm_jax.rewards.clip_features import load_clip_encoder
from mlcm_jax.rewards.registry import REWARD_MODELS, kind_of, parse_places
from mlcm_jax.sampling.sample import default_guidance_scale

MIN_IMAGES = max(metric.min_images for metric in SET_METRICS)


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
    scheduler: str | None = None
    image_size: int = 0
    height: int = 0
    width: int = 0

    @property
    def size(self) -> ImageSize | None:
        """Height and width in pixels; None: the model's own. Raises UserError for settings that contradict."""
        return asked_size(self.image_size, self.height, self.width)

    @property
    def protocol(self) -> EvaluationProtocol:
        return EvaluationProtocol(
            data_matches_prompts=self.data_matches_prompts,
            num_resamples=self.resamples,
            seed=self.seed,
            seed_prompts=min(self.diversity_prompts, self.num_images),
            num_seeds=self.diversity_seeds,
        )

    @property
    def reward_models(self) -> dict[str, str]:
        """Name and folder of each; raises UserError for an entry of --scorers that is none."""
        return {"clip": self.scorer} | parse_places("scorers", self.scorers, REWARD_MODELS)

    @property
    def extractors(self) -> dict[str, str]:
        """The same of --features."""
        return parse_places("features", self.features, FEATURE_EXTRACTORS) or {"clip": self.scorer}


def evaluate(settings: Settings, out: Path) -> str:
    """Sample, measure and write to ``out``; returns the tables. Raises UserError for settings that do not fit."""
    check_folder("out", out)
    steps, prompts = step_counts(settings.steps), chosen_prompts(settings)
    networks = load_networks(settings)
    pipelines = load_pipelines(settings)
    check_samplers(pipelines, steps, settings.reference_steps, settings.size)
    data = measure_data(settings, networks, settings.size or pipelines["model"].image_size)
    samplers = make_samplers(settings, pipelines, prompts)
    rows, reference = evaluate_samplers(
        settings.protocol, steps, settings.reference_steps, prompts, networks, samplers, data
    )
    about = provenance() | {"settings": dataclasses.asdict(settings)}
    return write_report(rows, reference, describe_networks(settings, networks, data), about, out)


def step_counts(steps: Sequence[str]) -> list[int]:
    """The numbers of --steps, ascending; raises UserError for anything else."""
    try:
        return sorted({int(n) for n in steps})
    except ValueError:
        raise UserError(f"--steps={','.join(steps)} is no list of whole numbers: write one like 1,2,4.") from None


def chosen_prompts(settings: Settings) -> list[str]:
    """The first --num_images prompts; raises UserError when the file has fewer, and for too few to compare."""
    prompts, n = read_prompts(settings.prompts), settings.num_images
    if n < MIN_IMAGES:
        raise UserError(f"--num_images={n} are too few to compare: give {MIN_IMAGES} or more.")
    if n > len(prompts):
        raise UserError(f"--num_images={n} is more than the {len(prompts)} prompts of {settings.prompts}: lower it.")
    return prompts[:n]


def load_networks(settings: Settings) -> Networks:
    """The CLIP of --scorer, and what --scorers and --features name."""
    places, clip = settings.reward_models, load_clip_encoder(settings.scorer)
    # before the reward models, which then share the CLIPs among them
    extractors = {name: load_extractor(name, place) for name, place in settings.extractors.items()}
    reward_models = {name: REWARD_MODELS[kind_of(name)].load(place) for name, place in places.items()}
    return Networks(clip, reward_models, extractors)


def describe_networks(settings: Settings, networks: Networks, data: Measurements | None) -> dict[str, str]:
    """What the networks of the report are, by the names that their figures have."""
    sizes = {"data": next(map(len, data.numbers.values()))} if data else {}
    sizes |= {"baseline": settings.num_images} if settings.baseline else {}
    found = {name: extractor.describe(sizes) for name, extractor in networks.extractors.items()}
    if data:
        found["pixels"] = "no network; the mean over the images as a part of the real images' mean"
    for name, place in settings.reward_models.items():
        found[f"{name}_score"] = f"{place} ({REWARD_MODELS[kind_of(name)].measures})"
    by_clip = [metric.title for metric in (*IMAGE_METRICS, *SEED_METRICS) if "clip" in metric.needs]
    return found | {", ".join(by_clip): f"the image tower of {settings.scorer}"}


def load_pipelines(settings: Settings) -> dict[str, Pipeline]:
    """The model, with --scheduler, and the baseline where there is one."""
    folders = {"model": settings.model} | ({"baseline": settings.baseline} if settings.baseline else {})
    pipelines = {
        name: load_pipeline(
            folder,
            architecture=settings.architecture,
            variant=settings.variant if name == "model" else None,
            revision=settings.revision if name == "model" else None,
            dtype=jnp.dtype(settings.dtype),
        )
        for name, folder in folders.items()
    }
    if settings.scheduler:
        pipelines["model"] = pipelines["model"].with_scheduler_class(settings.scheduler)
    return pipelines


def make_samplers(settings: Settings, pipelines: dict[str, Pipeline], prompts: list[str]) -> dict[str, Sampler]:
    """A sampler for each pipeline, with its guidance."""
    given = {"model": settings.guidance_scale, "baseline": settings.baseline_guidance_scale}
    samplers = {}
    for name, pipeline in pipelines.items():
        scale = given[name]
        scale = default_guidance_scale(pipeline) if scale is None else scale
        samplers[name] = Sampler(
            pipeline,
            prompts,
            name=name,
            guidance_scale=scale,
            batch_size=settings.batch_size,
            image_size=settings.size,
        )
    return samplers


def measure_data(settings: Settings, networks: Networks, size: ImageSize) -> Measurements | None:
    """The real images, at the size of the samples; None without --data. Raises UserError where there are too few."""
    if settings.data is None:
        return None
    real = RealImages(settings.data, size)
    needed = settings.num_images if settings.data_matches_prompts else MIN_IMAGES
    if len(real) < needed:
        raise UserError(f"--data={settings.data} has {len(real)} images: give {needed} or more.")
    n = needed if settings.data_matches_prompts else len(real)
    return networks.measure(real_inputs(real.batches(settings.batch_size, n)))
