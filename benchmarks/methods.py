"""The methods of configs/methods.py at equal work: python benchmarks/methods.py --data=real.npy --out=runs/methods.

Trains a student of the emoji teacher by each method with each seed, as many steps as --tflop is enough for, and
measures all at --steps, from the same noise. Writes results.json and methods.md, anew after each measurement, and in
the end methods.png and methods_grid_N.png. The same command goes on where it was stopped, inside a training too. A
method that fails is named in the results; the others go on, and the next call tries it again. All methods of a seed
come before the next seed.
docs/methods.md has the commands for what it needs.
"""

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

# Several processes share a GPU: none may take most of its memory at its start. Read at the first use of a device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from absl import flags
from comparison import STEPS, keep_settings, read_seeds
from methods_report import put_into_docs, write_pictures, write_report
from methods_tasks import TEACHER_NAME, Benchmark, measure_baselines, measure_student, run_folder, train
from processes import Task, run_all

from configs.methods import METHODS, get_config
from mlcm_jax.cli import run_main
from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.evaluate import step_counts
from mlcm_jax.outputs import check_folder
from mlcm_jax.training.checks import validate
from mlcm_jax.training.stages import read_stages

ROOT = Path(__file__).resolve().parents[1]

TEACHER = flags.DEFINE_string("teacher", "examples/emoji/teacher", "Diffusers folder that is distilled.")
CHOSEN = flags.DEFINE_list("methods", list(METHODS), f"Of {', '.join(METHODS)}.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "A training for each, whose figures are averaged.")
TFLOP = flags.DEFINE_float("tflop", 100.0, "Work of each training: matrix products and convolutions.", lower_bound=0.0)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Of all methods; default: each one's own.", lower_bound=1)
LATENTS = flags.DEFINE_string("latents", None, "File of launch/encode.py, for methods that train on data.")
DATA = flags.DEFINE_string("data", None, "Real images of the measured prompts: examples/emoji/real_images.py.")
FEATURES = flags.DEFINE_list(
    "features",
    ["efficientnet=networks/efficientnet", "clip=examples/emoji/scorer"],
    "As launch/evaluate.py takes them.",
)
NUM_IMAGES = flags.DEFINE_integer("num_images", 512, "Images that are measured.", lower_bound=4)
STEP_COUNTS = flags.DEFINE_list("steps", [str(n) for n in STEPS], "Numbers of sampling steps.")
JOBS = flags.DEFINE_integer("jobs", 1, "Processes at a time; on a GPU they share it.", lower_bound=1)
MAX_MINUTES = flags.DEFINE_float(
    "max_minutes", None, "Time after which trainings save and stop, and nothing is started.", lower_bound=0.0
)
DOCS = flags.DEFINE_bool("docs", False, "Put table, figure and grids into docs/methods.md.")
OUT = flags.DEFINE_string("out", "runs/methods", "Folder for the runs and the figures.")


def read_flags(out: Path) -> tuple[Benchmark, list[int]]:
    """What is asked for, and the seeds; raises UserError for what cannot work."""
    if unknown := [name for name in CHOSEN.value if name not in METHODS]:
        raise UserError(f"--methods has {unknown[0]!r}, which is no method: use some of {', '.join(METHODS)}.")
    if not DATA.value or not Path(DATA.value).exists():
        raise UserError(f"--data={DATA.value} is not there: make real images with examples/emoji/real_images.py.")
    benchmark = Benchmark(
        teacher=TEACHER.value,
        tflop=TFLOP.value,
        batch_size=BATCH_SIZE.value,
        latents=LATENTS.value,
        data=DATA.value,
        features=FEATURES.value,
        num_images=NUM_IMAGES.value,
        steps=step_counts(STEP_COUNTS.value),
    )
    for name, place in benchmark.protocol.extractors.items():
        if not Path(place).exists():
            raise UserError(f"--features={name}={place} is not there: docs/evaluate.md says how to make it.")
    for name in CHOSEN.value:
        config = get_config(name)
        if config.latents and not LATENTS.value:
            raise UserError(
                f"The method {name} trains on latents: make --latents=FILE with launch/encode.py, or leave it out of "
                "--methods."
            )
        for stage in read_stages(benchmark.config(name)):
            validate(stage.config)
    seeds = read_seeds(SEEDS.value)
    check_folder("out", out)
    keep_settings(dataclasses.asdict(benchmark), out)
    return benchmark, seeds


def tasks_of(benchmark: Benchmark, seeds: list[int], out: Path) -> list[Task]:
    """The baselines' samples, and a training and its measurement for each method and seed; what is done is left out."""
    tasks = [Task(TEACHER_NAME, partial(measure_baselines, benchmark, out), out / TEACHER_NAME / "log.txt")]
    for seed, name in itertools.product(seeds, CHOSEN.value):
        log, title = run_folder(out, name, seed) / "log.txt", f"{name}, seed {seed}"
        training = Task(f"training of {title}", partial(train, benchmark, out, name, seed), log)
        measuring = partial(measure_student, benchmark, out, name, seed)
        tasks += [training, Task(f"figures of {title}", measuring, log, needs=(TEACHER_NAME, training.name))]
    return tasks


def main():
    start, out = time.monotonic(), Path(OUT.value)
    benchmark, seeds = read_flags(out)
    deadline = math.inf if MAX_MINUTES.value is None else start + 60 * MAX_MINUTES.value

    def write(failed: Mapping[str, str] | None = None, unfinished: Sequence[str] = ()) -> str:
        return write_report(benchmark, CHOSEN.value, seeds, out, failed or {}, unfinished)

    def done(task: Task) -> None:
        print(f"{(time.monotonic() - start) / 60:6.1f} min  {task.name}", flush=True)
        if task.needs or task.name == TEACHER_NAME:
            write()

    failed, unfinished = run_all(tasks_of(benchmark, seeds, out), jobs=JOBS.value, deadline=deadline, done=done)
    text = write(failed, unfinished)
    if (out / "teacher.npz").is_file():
        write_pictures(CHOSEN.value, seeds, out)
    print(text, end="")
    if DOCS.value:
        put_into_docs(out, ROOT)
    if failed:
        raise UserError(f"Failed: {'; '.join(f'{name}: {reason}' for name, reason in failed.items())}")
    if unfinished:
        print(f"Not finished: {len(unfinished)} of the tasks. The same command goes on.")


if __name__ == "__main__":
    run_main(main)
