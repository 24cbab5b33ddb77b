"""What benchmarks/methods.py does in processes of their own: samples of the baselines, trainings, measurements."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from comparison import REFERENCE_STEPS, Measurer, distil_once, figures_of, protocol, read_measured
from equal_work import of_length, scaled_starts, stage_flops, steps_for, work
from ml_collections import ConfigDict

from configs.emoji_full import GUIDANCE_SCALE
from configs.methods import get_config
from mlcm_jax.evaluation.evaluate import Settings
from mlcm_jax.evaluation.provenance import provenance
from mlcm_jax.evaluation.report import Row
from mlcm_jax.hub.load import read_json
from mlcm_jax.hub.save import write_json
from mlcm_jax.outputs import atomic_write
from mlcm_jax.training.export import SAMPLERS
from mlcm_jax.training.stages import read_stages

CHECKPOINTS = 10  # of a training
TEACHER_NAME = "teacher"
UNTRAINED = {f"untrained_{sampler}": sampler for sampler in SAMPLERS}  # a student before training, by its sampler
BASELINES = (TEACHER_NAME, *UNTRAINED)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The flags of benchmarks/methods.py that figures depend on. batch_size: None: each method's own."""

    teacher: str
    tflop: float
    batch_size: int | None
    latents: str | None
    data: str
    features: Sequence[str]
    num_images: int
    steps: Sequence[int]

    @property
    def protocol(self) -> Settings:
        return protocol(
            self.teacher,
            GUIDANCE_SCALE,
            data=self.data,
            features=self.features,
            num_images=self.num_images,
            steps=self.steps,
        )

    def config(self, method: str) -> ConfigDict:
        """A method's configuration, of the length that it has in configs/methods.py."""
        config = get_config(method)
        config.teacher = self.teacher
        config.batch_size = self.batch_size or config.batch_size
        if config.latents:
            config.latents = self.latents or ""
        # The students are measured with images of their own, so a run samples few.
        config.sample.update({"steps": (4,), "teacher_steps": 4, "teacher_few_steps": 4})
        return config


def run_folder(out: Path, name: str, seed: int) -> Path:
    """Of a method's run, or of a baseline, which all seeds share."""
    return out / name if name in BASELINES else out / "runs" / f"{name}_{seed}"


def plan_file(out: Path, method: str) -> Path:
    return out / "plans" / f"{method}.json"


def image_file(folder: Path, num_steps: int) -> Path:
    return folder / f"images_{num_steps}.npy"


def measure_baselines(benchmark: Benchmark, out: Path) -> None:
    """The teacher's samples, which students are compared with, its figures, and those of the untrained student."""
    folder = out / TEACHER_NAME
    write_json(provenance(), folder / "about.json")
    figures, samples = folder / "figures.json", out / "teacher.npz"
    if str(REFERENCE_STEPS) not in read_measured(figures):
        samples.unlink(missing_ok=True)
    measurer = Measurer(benchmark.protocol, samples)
    if row := measurer.reference_row:
        keep_images(row, image_file(folder, REFERENCE_STEPS))
        write_json({str(REFERENCE_STEPS): figures_of(row)}, figures)
    for row in measurer(measurer.teacher(), benchmark.steps, figures):
        keep_images(row, image_file(folder, row.num_steps))
    for name, sampler in UNTRAINED.items():
        for row in measurer(measurer.untrained(sampler), benchmark.steps, out / name / "figures.json"):
            keep_images(row, image_file(out / name, row.num_steps))


def equal_work_config(benchmark: Benchmark, method: str, file: Path) -> ConfigDict:
    """A method's configuration with as many steps as ``benchmark.tflop`` is enough for.

    file: keeps what was counted.
    """
    config = benchmark.config(method)
    if not file.is_file():
        starts, flops = [stage.start for stage in read_stages(config)], stage_flops(config)
        n = steps_for(benchmark.tflop * 1e12, flops, starts, config.num_steps)
        starts = scaled_starts(starts, config.num_steps, n)
        plan = {"num_steps": n, "starts": starts, "gflop_per_step": [f / 1e9 for f in flops]}
        write_json(plan | {"batch_size": config.batch_size, "tflop": work(flops, starts, n) / 1e12}, file)
    config = of_length(config, read_json(file)["num_steps"])
    config.checkpoint_every, config.sample_every = -(-config.num_steps // CHECKPOINTS), config.num_steps
    return config


def train(benchmark: Benchmark, out: Path, method: str, seed: int) -> None:
    """Train a method's student and export it."""
    config = equal_work_config(benchmark, method, plan_file(out, method))
    config.seed = seed
    distil_once(config, run_folder(out, method, seed))


def measure_student(benchmark: Benchmark, out: Path, method: str, seed: int) -> None:
    """The figures of a student, and some of its images."""
    folder = run_folder(out, method, seed)
    measurer = Measurer(benchmark.protocol, out / "teacher.npz")
    for row in measurer(measurer.student(folder / "export"), benchmark.steps, folder / "figures.json"):
        keep_images(row, image_file(folder, row.num_steps))


def keep_images(row: Row, file: Path) -> None:
    """The first images of a row, for grids."""
    with atomic_write(file) as f:
        np.save(f, row.examples)
