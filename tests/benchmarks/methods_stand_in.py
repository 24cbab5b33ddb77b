"""benchmarks/methods.py without networks: trainings leave a name, samplers have figures that follow from it.

Seed 7 fails with a sentence, seed 8 is killed, seed 9 takes a minute. OUT/trainings.txt and OUT/measurements.txt get a
line each time that one is done.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, "benchmarks")  # as for the program itself
import comparison
import methods_tasks
import numpy as np

from mlcm_jax.cli import run_main
from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.measure import Column
from mlcm_jax.evaluation.report import Row
from mlcm_jax.evaluation.statistics.bootstrap import Figure
from mlcm_jax.training.stages import read_stages

KEYS = ("frechet_distance/efficientnet/data", "clip-guard_score", "clip_score", "latent_mse")


def distill(config, workdir):
    out = workdir.parents[1]
    if config.seed == 7:
        raise UserError("The loss is not finite.")
    if config.seed == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    if config.seed == 9:
        print("training", flush=True)
        time.sleep(60)
    (workdir / "export").mkdir(parents=True, exist_ok=True)
    (workdir / "export" / "name").write_text(f"{workdir.name} {config.num_steps}")
    append(out / "trainings.txt", workdir.name)


class Measurer(comparison.Measurer):
    def __init__(self, settings, file: Path):
        self._evaluator, self._out, self.reference_row = self, file.parent, None
        if not file.exists():
            self.reference_row = self.measure("teacher", 25)
            file.touch()

    def teacher(self):
        return "teacher"

    def untrained(self, sampler: str):
        return f"untrained_{sampler}"

    def student(self, folder: Path):
        return (folder / "name").read_text()

    def measure(self, sampler: str, num_steps: int) -> Row:
        append(self._out / "measurements.txt", f"{sampler} {num_steps}")
        value = 1.0 + len(sampler) + 8 / num_steps
        noise = np.random.default_rng(num_steps).standard_normal(300)
        figures = {Column(key, key, "lower", 2, ""): Figure(value, value + 0.1 * noise) for key in KEYS}
        images = np.full((16, 8, 8, 3), 10 * num_steps, np.uint8)
        return Row(sampler, num_steps, "TCDScheduler", 1.0, figures, images)


def append(file: Path, line: str) -> None:
    with file.open("a") as f:
        f.write(line + "\n")


if __name__ == "__main__":
    comparison.distill = distill
    methods_tasks.Measurer = Measurer
    methods_tasks.stage_flops = lambda config: [1e12 * (n + 1) for n in range(len(read_stages(config)))]
    import methods

    run_main(methods.main)
