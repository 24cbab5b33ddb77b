"""Students of one teacher beside each other: measured at the same numbers of steps, from the same noise as the teacher.

benchmarks/ablation.py and benchmarks/methods.py share it. The teacher is sampled once and kept in a file, so that a
student can be measured by another process, or by a later one.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in launch/evaluate.py

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.evaluate import Settings, chosen_prompts, load_networks, measure_data
from mlcm_jax.evaluation.evaluator import Evaluator
from mlcm_jax.evaluation.measure import Measurements, Reference
from mlcm_jax.evaluation.report import Row
from mlcm_jax.evaluation.sampling import Sampler
from mlcm_jax.evaluation.statistics.bootstrap import Figure
from mlcm_jax.hub.load import read_json
from mlcm_jax.hub.pipeline import Pipeline, load_pipeline
from mlcm_jax.hub.save import write_json
from mlcm_jax.outputs import atomic_write
from mlcm_jax.training.export import student_scheduler_config
from mlcm_jax.training.run import distill

STEPS = (1, 2, 4, 8)
REFERENCE_STEPS = 25  # of the teacher
RESAMPLES = 200
SCORER = "examples/emoji/scorer"
HELD_OUT_SCORER = "clip-guard=examples/emoji/guard"

Figures = dict[str, dict[str, Any]]  # metric's key -> value and replicates, as JSON has them
Measured = dict[str, Figures]  # number of steps -> figures


def protocol(
    teacher: str,
    guidance_scale: float,
    *,
    data: str | None,
    features: Sequence[str],
    num_images: int,
    steps: Sequence[int] = STEPS,
) -> Settings:
    """What is measured, in launch/evaluate.py's terms.

    guidance_scale: of the teacher. data: real images of the measured prompts, where there are some. features: as
    launch/evaluate.py takes them.
    """
    return Settings(
        model=teacher,
        baseline=teacher,
        steps=[str(n) for n in steps],
        reference_steps=REFERENCE_STEPS,
        guidance_scale=None,
        baseline_guidance_scale=guidance_scale,
        prompts="examples/emoji/prompts/eval.txt",
        num_images=num_images,
        data=data,
        data_matches_prompts=True,
        scorer=SCORER,
        scorers=[HELD_OUT_SCORER],
        features=features,
        diversity_prompts=0,
        diversity_seeds=2,
        resamples=RESAMPLES,
        seed=0,
        batch_size=64,
        dtype="float32",
    )


class Measurer:
    """Samples with one student after another, and compares with the teacher's samples in a file.

    The file is made where it is not there, with the measurements of the real images; ``reference_row`` then holds the
    teacher's figures.
    """

    def __init__(self, settings: Settings, file: Path):
        assert settings.baseline_guidance_scale is not None
        self._settings, self._guidance_scale = settings, settings.baseline_guidance_scale
        self._prompts, networks = chosen_prompts(settings), load_networks(settings)
        if file.is_file():
            data, reference = _read(file)
        else:
            teacher = load_pipeline(settings.model, dtype=jnp.float32)
            data, reference = measure_data(settings, networks, teacher.image_size), None
        bar = tqdm(disable=True)
        self._evaluator = Evaluator(settings.protocol, self._prompts, networks, data, bar, reference=reference)
        self.reference_row: Row | None = None
        if reference is None:
            self.reference_row = self._evaluator.measure(self.teacher(), REFERENCE_STEPS, as_reference=True)
            assert self._evaluator.reference
            _write(file, data, *self._evaluator.reference)

    def teacher(self) -> Sampler:
        pipeline = load_pipeline(self._settings.model, dtype=jnp.float32)
        return self._sampler("teacher", pipeline, self._guidance_scale)

    def untrained(self, sampler: str) -> Sampler:
        """What a student is before its first step: the teacher without guidance. sampler: as in the configuration."""
        pipeline = load_pipeline(self._settings.model, dtype=jnp.float32)
        scheduler_config = student_scheduler_config(pipeline.scheduler_config, sampler)
        return self._sampler("untrained", pipeline.with_scheduler(scheduler_config), 1.0)

    def student(self, folder: Path) -> Sampler:
        """Of an exported student. Its guidance is in its weights, or it is given the teacher's scale."""
        pipeline = load_pipeline(folder, dtype=jnp.float32)
        conditioned = pipeline.unet.config.get("time_cond_proj_dim")
        return self._sampler("student", pipeline, self._guidance_scale if conditioned else 1.0)

    def __call__(self, sampler: Sampler, steps: Sequence[int], file: Path) -> Iterator[Row]:
        """Rows of those numbers of steps whose figures are not in ``file`` yet, and puts each row's there."""
        measured = read_measured(file)
        for num_steps in steps:
            if str(num_steps) not in measured:
                row = self._evaluator.measure(sampler, num_steps)
                yield row
                measured[str(num_steps)] = figures_of(row)
                write_json(measured, file)

    def _sampler(self, name: str, pipeline: Pipeline, guidance_scale: float) -> Sampler:
        size = self._settings.batch_size
        return Sampler(pipeline, self._prompts, name=name, guidance_scale=guidance_scale, batch_size=size)


def distil_once(config: ConfigDict, workdir: Path) -> None:
    """Train to the end and export, from where an earlier process was stopped; nothing where one came to the end."""
    done = workdir / "done"
    if not done.is_file():
        distill(config, workdir)
        done.touch()


def read_measured(file: Path) -> Measured:
    """What a Measurer has written; nothing where it has not begun."""
    return read_json(file) if file.is_file() else {}


def figures_of(row: Row) -> Figures:
    """All figures of a row, as JSON."""
    return {column.key: _as_json(figure) for column, figure in row.figures.items()}


def _as_json(figure: Figure) -> dict[str, Any]:
    return {"value": figure.value, "replicates": [float(f"{r:.6g}") for r in figure.replicates[:RESAMPLES]]}


def over_seeds(runs: Mapping[str, Measured], num_steps: int, metric: str) -> Figure:
    """The mean over seeds. Its replicates resample seeds as well as prompts, the same ones for all rows."""
    figures = [run[str(num_steps)][metric] for run in runs.values()]
    replicates, n = np.array([figure["replicates"] for figure in figures]), len(figures)
    seeds = np.random.default_rng(n).integers(n, size=(RESAMPLES, n))
    resampled = replicates[seeds, np.arange(RESAMPLES)[:, None]].mean(axis=1)
    return Figure(float(np.mean([figure["value"] for figure in figures])), resampled)


def paired_ratio(
    runs: Mapping[str, Measured], others: Mapping[str, Measured], num_steps: int, metric: str
) -> Figure | None:
    """The figure over that of ``others``, by the seeds that both have; None where there is none.

    Paired: captions, noise and seeds are the same, and resampled alike. Its interval is therefore narrower than those
    of the two figures.
    """
    both = [s for s in runs if all(metric in of.get(s, {}).get(str(num_steps), {}) for of in (runs, others))]
    if not both:
        return None
    mine, theirs = (over_seeds({seed: of[seed] for seed in both}, num_steps, metric) for of in (runs, others))
    return mine.over(theirs)


def read_seeds(given: Sequence[str]) -> list[int]:
    """The numbers of --seeds; raises UserError for anything else."""
    if not given or not all(seed.isdigit() for seed in given):
        raise UserError(f"--seeds={','.join(given)} is no list of whole numbers: write one like 0,1,2.")
    return [int(seed) for seed in given]


def keep_settings(settings: Mapping[str, Any], out: Path) -> None:
    """Write what figures depend on to ``out``; raises UserError for a folder of figures that others made."""
    file = out / "settings.json"
    if file.is_file() and (found := read_json(file)) != settings:
        changed = ", ".join(name for name in settings if found.get(name) != settings[name])
        raise UserError(f"{out} holds figures of other settings ({changed}): use another --out, or those in {file}.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(dict(settings), file)


def _write(file: Path, data: Measurements | None, reference: Reference, measured: Measurements) -> None:
    arrays = {"latents": np.asarray(reference.latents), "images": reference.images}
    for name, found in (("data", data), ("teacher", measured)):
        for kind, by_key in dataclasses.asdict(found).items() if found else ():
            arrays |= {f"{name}/{kind}/{key}": array for key, array in by_key.items()}
    with atomic_write(file) as f:
        np.savez(f, **arrays)


def _read(file: Path) -> tuple[Measurements | None, tuple[Reference, Measurements]]:
    with np.load(file) as stored:
        arrays = dict(stored)
    kinds = [field.name for field in dataclasses.fields(Measurements)]
    data, teacher = (
        Measurements(**{kind: _below(arrays, f"{name}/{kind}/") for kind in kinds}) for name in ("data", "teacher")
    )
    reference = Reference(jnp.asarray(arrays["latents"]), arrays["images"])
    return data if data.features else None, (reference, teacher)


def _below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
