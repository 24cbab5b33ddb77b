"""How close a few-step student comes to its teacher: python benchmarks/closeness.py --student=runs/emoji/export.

The same prompts from the same initial noise, drawn by the teacher in many steps (the reference), by the teacher in few
and by the student in few. Against the reference: mean squared latent distance with its bootstrap interval over the
prompts, and the Frechet distance of the pictures in a CLIP image tower (arXiv 1706.08500). Of each by itself: the mean
cosine similarity of pictures and prompts. Writes results.json, results.md, closeness.png and grid.png to --out.
"""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from mlcm_jax.cli import run_main
from mlcm_jax.conditioning import encode_prompts, unconditional
from mlcm_jax.data.prompts import read_prompts
from mlcm_jax.diffusion.samplers import step_table
from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.clip_features import image_features, load_scorer
from mlcm_jax.evaluation.clip_score import clip_scores, load_scorer_tokenizer, text_features
from mlcm_jax.evaluation.frechet import frechet_distance
from mlcm_jax.export import ddim_scheduler_config
from mlcm_jax.generate import decode, draw_noise, latent_distance, sample_latents
from mlcm_jax.hub.pipeline import Pipeline, load_pipeline
from mlcm_jax.hub.save import write_json
from mlcm_jax.pictures import labelled_grid, plot_closeness

TEACHER = flags.DEFINE_string("teacher", "examples/emoji/teacher", "The teacher's folder or hub id.")
STUDENT = flags.DEFINE_string("student", "runs/emoji/export", "The student's folder or hub id.")
SCORER = flags.DEFINE_string("scorer", "examples/emoji/scorer", "Folder of a CLIPModel with its tokenizer.")
PROMPTS = flags.DEFINE_string("prompts", "examples/emoji/prompts/eval.txt", "Text file, one prompt a line.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 512, "Prompts that are drawn, from the file's first on.", lower_bound=2)
STEPS = flags.DEFINE_list("steps", ["1", "2", "4", "8"], "Numbers of steps of teacher and student.")
REFERENCE_STEPS = flags.DEFINE_integer("reference_steps", 25, "Steps of the teacher's result that is compared with.")
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", 5.0, "Of the teacher; the student has it within.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the initial noise.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Pictures that are drawn at a time.", lower_bound=1)
OUT = flags.DEFINE_string("out", "runs/closeness", "Folder for what is written.")

NUM_RESAMPLES = 2000
NUM_IN_GRID = 16
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers")


@dataclasses.dataclass(frozen=True)
class Sampler:
    """One way to draw all prompts: who draws, along which scheduler, with how many steps."""

    who: str
    scheduler_config: dict[str, Any]
    guidance_scale: float
    num_steps: int

    def label(self) -> str:
        return f"{self.who} {self.num_steps} step{'s' if self.num_steps > 1 else ''}"


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a sampler made, and what the scorer sees in it."""

    latents: jax.Array
    images: np.ndarray
    features: np.ndarray


def step_counts() -> list[int]:
    try:
        return sorted({int(n) for n in STEPS.value})
    except ValueError:
        raise UserError(f"--steps={','.join(STEPS.value)} is no list of whole numbers: write one like 1,2,4.") from None


def chosen_prompts() -> list[str]:
    prompts = read_prompts(PROMPTS.value)
    if NUM_IMAGES.value > len(prompts):
        raise UserError(
            f"--num_images={NUM_IMAGES.value} is more than the {len(prompts)} prompts of {PROMPTS.value}: lower it."
        )
    return prompts[: NUM_IMAGES.value]


def check_out(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out={folder} is a file: name a folder.")
    return folder


def latent_shape(pipeline: Pipeline) -> tuple[int, int, int]:
    side = pipeline.unet.config["sample_size"]
    return side, side, pipeline.unet.config.get("in_channels", 4)


def plan(pipelines: dict[str, Pipeline]) -> list[Sampler]:
    """All samplers, the reference first; raises UserError for models and step counts that do not fit."""
    teacher, student = pipelines["teacher"], pipelines["student"]
    shapes = [latent_shape(pipeline) for pipeline in (teacher, student)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"The teacher's latents are {list(shapes[0])} and the student's {list(shapes[1])}: "
            "name a student that was distilled from this teacher."
        )
    ddim, few = ddim_scheduler_config(teacher.scheduler_config), step_counts()
    samplers = [
        Sampler("teacher", ddim, GUIDANCE_SCALE.value, REFERENCE_STEPS.value),
        *(Sampler("teacher", ddim, GUIDANCE_SCALE.value, n) for n in few if n != REFERENCE_STEPS.value),
        *(Sampler("student", student.scheduler_config, 1.0, n) for n in few),
    ]
    for sampler in samplers:
        step_table(sampler.scheduler_config, sampler.num_steps)  # answers a wrong number before anything is compiled
    return samplers


class Artist:
    """Draws the prompts with one pipeline; every batch has the same size, so that each program compiles once."""

    def __init__(self, pipeline: Pipeline, prompts: list[str]):
        self._pipeline, self._n, self._size = pipeline, len(prompts), min(BATCH_SIZE.value, len(prompts))
        shape = latent_shape(pipeline)
        image_size = shape[0] * 2 ** (len(pipeline.vae.config["block_out_channels"]) - 1)
        self._noise = draw_noise(SEED.value, self._n, shape)
        self._conditioning = encode_prompts(pipeline, prompts, image_size)
        self._unconditional = unconditional(pipeline, self._size, image_size)

    def batches(self, sampler: Sampler) -> Iterator[jax.Array]:
        """Clean latents, batch by batch; the last batch is cut to the prompts that are left."""
        for batch, start in enumerate(range(0, self._n, self._size)):
            rows = np.arange(start, start + self._size) % self._n
            latents = sample_latents(
                self._pipeline.unet,
                sampler.scheduler_config,
                self._noise[rows],
                jax.tree.map(lambda x, rows=rows: x[rows], self._conditioning),
                self._unconditional,
                guidance_scale=sampler.guidance_scale,
                num_steps=sampler.num_steps,
                rng=jax.random.fold_in(jax.random.key(SEED.value), batch),
            )
            yield latents[: self._n - start]


def interval(values: np.ndarray) -> list[float]:
    """95 % bootstrap interval of the mean."""
    rng = np.random.default_rng(0)
    means = [rng.choice(values, len(values)).mean() for _ in range(NUM_RESAMPLES)]
    return np.percentile(means, [2.5, 97.5]).tolist()


def measure(sampler: Sampler, drawn: Drawn, reference: Drawn, texts: np.ndarray) -> dict[str, Any]:
    distances = latent_distance(drawn.latents, reference.latents)
    scores = clip_scores(drawn.features, texts)
    return {
        "sampler": sampler.who,
        "steps": sampler.num_steps,
        "latent_mse": float(distances.mean()),
        "latent_mse_interval": interval(distances),
        "frechet_distance": frechet_distance(drawn.features, reference.features),
        "clip_score": float(scores.mean()),
        "clip_score_interval": interval(scores),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| sampler | steps | latent distance (95 % interval) | Frechet distance | CLIP score (95 % interval) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        (low, high), (score_low, score_high) = row["latent_mse_interval"], row["clip_score_interval"]
        lines.append(
            f"| {row['sampler']} | {row['steps']} | {row['latent_mse']:.4f} ({low:.4f} to {high:.4f}) "
            f"| {row['frechet_distance']:.3f} | {row['clip_score']:.4f} ({score_low:.4f} to {score_high:.4f}) |"
        )
    return "\n".join(lines) + "\n"


def curves(rows: list[dict[str, Any]], key: str) -> dict[str, dict[int, float]]:
    """For student and teacher the values against the steps, without the reference, which is the first row."""
    return {who: {r["steps"]: r[key] for r in rows[1:] if r["sampler"] == who} for who in ("student", "teacher")}


def hardware() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor() or platform.machine()
    devices = [device.device_kind for device in jax.devices()]
    return {"cpu": cpu, "cores": os.cpu_count(), "jax_devices": devices}


def provenance() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": hardware(),
        "versions": versions | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def write(rows: list[dict[str, Any]], drawn: dict[str, Drawn], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.md").write_text(markdown(rows))
    reference_name = f"teacher's {REFERENCE_STEPS.value}-step result"
    settings = {
        "num_images": NUM_IMAGES.value,
        "guidance_scale": GUIDANCE_SCALE.value,
        "seed": SEED.value,
        "batch_size": BATCH_SIZE.value,
    }
    write_json(provenance() | settings | {"reference": reference_name, "rows": rows}, out / "results.json")
    panels = {
        f"mean squared latent distance\nto the {reference_name}": curves(rows, "latent_mse"),
        f"Frechet distance of CLIP features\nto the {reference_name}": curves(rows, "frechet_distance"),
    }
    plot_closeness(panels, out / "closeness.png")
    grid = labelled_grid({label: result.images[:NUM_IN_GRID] for label, result in drawn.items()}, blocks=2)
    Image.fromarray(grid).save(out / "grid.png")


def main():
    prompts, out = chosen_prompts(), check_out(Path(OUT.value))
    step_counts()  # a wrong list is answered before the models are read
    scorer, tokenizer = load_scorer(SCORER.value), load_scorer_tokenizer(SCORER.value)
    pipelines = {"teacher": load_pipeline(TEACHER.value), "student": load_pipeline(STUDENT.value)}
    samplers = plan(pipelines)
    artists = {who: Artist(pipeline, prompts) for who, pipeline in pipelines.items()}
    drawn = {}
    with tqdm(total=len(samplers) * len(prompts), unit="picture") as progress:
        for sampler in samplers:
            progress.set_description(sampler.label())
            latents, images = [], []
            for batch in artists[sampler.who].batches(sampler):
                latents.append(batch)
                images.append(decode(pipelines[sampler.who].vae, batch))
                progress.update(len(batch))
            pictures = np.concatenate(images)
            drawn[sampler.label()] = Drawn(jnp.concatenate(latents), pictures, image_features(scorer, pictures))
    texts = text_features(scorer, tokenizer, prompts)
    reference = drawn[samplers[0].label()]
    rows = [measure(sampler, drawn[sampler.label()], reference, texts) for sampler in samplers]
    write(rows, drawn, out)
    print(markdown(rows), end="")


if __name__ == "__main__":
    run_main(main)
