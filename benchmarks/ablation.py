"""What each part of the method is worth: python benchmarks/ablation.py --latents=FILE --out=runs/ablation.

Distils the emoji teacher once for each row of configs/emoji_ablation.py and each seed, on equally many examples, and
measures the students at 1, 2, 4 and 8 steps, all from the same noise. Writes ablation.json, ablation.md and
ablation.png. The same command goes on where it was stopped, inside a training too. All rows of a seed come before the
next seed.
docs/ablation.md has the command with all that it needs, and figures.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from absl import flags
from comparison import (
    STEPS,
    Measured,
    Measurer,
    distil_once,
    keep_settings,
    over_seeds,
    paired_ratio,
    protocol,
    read_measured,
    read_seeds,
)
from matplotlib.ticker import LogLocator
from ml_collections import ConfigDict

from configs.emoji_ablation import ROWS, row_config
from examples.emoji.results_tables import provenance as provenance_line
from examples.emoji.results_tables import put_into_page
from mlcm_jax.cli import run_main
from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.provenance import provenance
from mlcm_jax.evaluation.sampling import Sampler
from mlcm_jax.evaluation.statistics.bootstrap import Figure
from mlcm_jax.hub.load import read_json
from mlcm_jax.hub.save import write_json
from mlcm_jax.training.program import build_program
from mlcm_jax.training.run import describe_teacher

ROOT = Path(__file__).resolve().parents[1]
COMPARED_WITH = "streaming"
METRICS = {  # of launch/evaluate.py: heading, decimals
    "frechet_distance/efficientnet/data": ("Frechet distance to real images, EfficientNet, lower is better", 1),
    "latent_mse": ("Latent distance to the teacher's 25 steps, lower is better", 3),
    "clip-guard_score": ("CLIP score of a held-out CLIP, higher is better", 3),
    "clip_score": ("CLIP score, higher is better", 3),
}
RATIOS = {"frechet_distance/efficientnet/data": "Frechet distance", "latent_mse": "Latent distance"}
PAGE, MARKER = "docs/ablation.md", "ablation"

TEACHER = flags.DEFINE_string("teacher", "examples/emoji/teacher", "Diffusers folder that is distilled.")
ROW_NAMES = flags.DEFINE_list("rows", list(ROWS), f"Of {', '.join(ROWS)}.")
NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 11_200, "Training examples of each run.", lower_bound=2)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Examples a training step.", lower_bound=1)
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "A training for each, whose figures are averaged.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 512, "Images that are measured.", lower_bound=4)
LATENTS = flags.DEFINE_string("latents", None, "File of launch/encode.py for the training prompts, for the row lcm.")
DATA = flags.DEFINE_string("data", None, "Real images of the measured prompts: examples/emoji/real_images.py.")
FEATURES = flags.DEFINE_list("features", ["clip=examples/emoji/scorer"], "As launch/evaluate.py takes them.")
DOCS = flags.DEFINE_bool("docs", False, "Put tables and figure into docs/ablation.md.")
OUT = flags.DEFINE_string("out", "runs/ablation", "Folder for the runs and the figures.")


def run_config(name: str, seed: int) -> ConfigDict:
    """The configuration of a row's run with a seed."""
    num_steps = NUM_EXAMPLES.value // BATCH_SIZE.value
    config = row_config(name, num_steps)
    config.update({"teacher": TEACHER.value, "seed": seed, "batch_size": BATCH_SIZE.value, "sample_every": num_steps})
    if config.states == "data":
        config.latents = LATENTS.value
    return config


def flops_per_example(config: ConfigDict) -> float:
    """Mean over the run's stages: matrix products and convolutions of the steps, with loops counted in full."""
    stages = build_program(config, describe_teacher(config, weights_needed=False)).plan.stages
    return sum((s.end - s.start) * s.flops_per_step for s in stages) / stages[-1].end / config.batch_size


def table(heading: str, rows: Mapping[str, Any], cell) -> str:
    """A Markdown table with a column for each number of steps. cell: (row's key, number of steps) -> Figure."""
    lines = [
        f"### {heading}\n",
        "| row | seeds | GFLOP an example | " + " | ".join(f"{n} step{'s' * (n > 1)}" for n in STEPS) + " |",
    ]
    lines.append("|---" * (3 + len(STEPS)) + "|")
    for key, row in rows.items():
        flops = "" if row["flops_per_example"] is None else f"{row['flops_per_example'] / 1e9:.1f}"
        cells = " | ".join(cell(key, n) for n in STEPS)
        lines.append(f"| {row['title']} | {len(row['runs'])} | {flops} | {cells} |")
    return "\n".join(lines) + "\n"


def _text(figure: Figure, decimals: int) -> str:
    low, high = figure.interval
    return f"{figure.value:.{decimals}f} ({low:.{decimals}f} to {high:.{decimals}f})"


def report(results: dict[str, Any], out: Path) -> str:
    """Write what there is so far; returns the tables."""
    write_json(results, out / "ablation.json")
    rows = results["rows"]
    some_run = next(iter(rows["teacher"]["runs"].values()))
    metrics = [m for m in METRICS if m in some_run[str(STEPS[0])]]
    parts = []
    for m in metrics:
        heading, decimals = METRICS[m]
        parts.append(table(heading, rows, lambda k, n, m=m, d=decimals: _text(over_seeds(rows[k]["runs"], n, m), d)))
    if COMPARED_WITH in rows:
        parts += [_ratios(rows, metric) for metric in RATIOS if metric in metrics]
    text = "\n".join([*parts, provenance_line(results["about"]), ""])
    (out / "ablation.md").write_text(text)
    _plot(rows, metrics, out / "ablation.png")
    return text


def _paired(rows: Mapping[str, Any]) -> dict[str, Any]:
    """The other rows, with those seeds that COMPARED_WITH has as well."""
    seeds, others = rows[COMPARED_WITH]["runs"], {key: row for key, row in rows.items() if key != COMPARED_WITH}
    shared = {
        key: row | {"runs": {s: row["runs"][s] for s in seeds if s in row["runs"]}} for key, row in others.items()
    }
    return {key: row for key, row in shared.items() if row["runs"]}


def _ratios(rows: Mapping[str, Any], metric: str) -> str:
    paired, other = _paired(rows), rows[COMPARED_WITH]["runs"]

    def cell(key: str, n: int) -> str:
        ratio = paired_ratio(paired[key]["runs"], other, n, metric)
        assert ratio  # ``_paired`` has seen to it
        return _text(ratio, 2)

    return table(f"{RATIOS[metric]} over that of {COMPARED_WITH}, paired", paired, cell)


def _plot(rows: Mapping[str, Any], metrics: Sequence[str], path: Path) -> None:
    """A panel for each metric: the rows one below the other, with their intervals at 2 and 4 steps."""
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.5 * len(metrics), 4.5), layout="constrained", sharey=True)
    names, places = [row["title"] for row in rows.values()], np.arange(len(rows))
    for panel, metric in zip(axes, metrics, strict=True):
        for n, mark, shift in ((2, "s", -0.12), (4, "o", 0.12)):
            found = [over_seeds(row["runs"], n, metric) for row in rows.values()]
            value = np.array([f.value for f in found])
            low, high = np.array([f.interval for f in found]).T
            errors = np.maximum([value - low, high - value], 0)
            panel.errorbar(value, places + shift, xerr=errors, fmt=mark, capsize=3, label=f"{n} steps")
        panel.set(xlabel=METRICS[metric][0].replace(", ", "\n"))
        if "score" not in metric:
            panel.set_xscale("log", subs=[])
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
        panel.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(places, labels=names)
    axes[0].invert_yaxis()
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def check(out: Path) -> list[int]:
    """The seeds; raises UserError for flags that cannot work, and for a folder of figures that other flags made."""
    if unknown := [name for name in ROW_NAMES.value if name not in ROWS]:
        raise UserError(f"--rows has {unknown[0]!r}, which is no row: use some of {', '.join(ROWS)}.")
    if "lcm" in ROW_NAMES.value and not LATENTS.value:
        raise UserError("The row lcm needs --latents: make the file with launch/encode.py, or give --rows without lcm.")
    if NUM_EXAMPLES.value < 2 * BATCH_SIZE.value:
        raise UserError(f"--num_examples={NUM_EXAMPLES.value} is less than two steps of {BATCH_SIZE.value}: raise it.")
    seeds = read_seeds(SEEDS.value)
    names = ("teacher", "num_examples", "batch_size", "num_images", "data", "features")
    keep_settings({name: flags.FLAGS[name].value for name in names}, out)
    return seeds


def measurer(guidance_scale: float, out: Path) -> Measurer:
    settings = protocol(
        TEACHER.value, guidance_scale, data=DATA.value, features=FEATURES.value, num_images=NUM_IMAGES.value
    )
    return Measurer(settings, out / "teacher.npz")


def main():
    out = Path(OUT.value)
    seeds = check(out)
    measure = measurer(run_config(COMPARED_WITH, seeds[0]).guidance_scale, out)
    teacher = measured(measure, measure.teacher, out / "teacher.json")
    teachers = {str(seed): teacher for seed in seeds}  # it is the same for each
    rows: dict[str, Any] = {"teacher": {"title": "teacher", "flops_per_example": None, "runs": teachers}}
    results, text = {"about": provenance() | read_json(out / "settings.json"), "rows": rows}, ""
    for seed in seeds:
        for name in ROW_NAMES.value:
            config, workdir = run_config(name, seed), out / "runs" / f"{name}_{seed}"
            there = ": there already" if (workdir / "figures.json").exists() else ""
            print(f"== {name}, seed {seed}{there}", flush=True)
            distil_once(config, workdir)
            if name not in rows:
                rows[name] = {"title": ROWS[name].title, "flops_per_example": flops_per_example(config), "runs": {}}
            student = partial(measure.student, workdir / "export")
            rows[name]["runs"][str(seed)] = measured(measure, student, workdir / "figures.json")
            text = report(results, out)
            jax.clear_caches()  # of steps that no later run takes
            gc.collect()
    print(text, end="")
    if DOCS.value:
        put_into_page(ROOT / PAGE, MARKER, text, [out / "ablation.png"])


def measured(measure: Measurer, sampler: Callable[[], Sampler], file: Path) -> Measured:
    """The figures in ``file``, which are made where they are not there."""
    if not read_measured(file).keys() >= {str(n) for n in STEPS}:
        list(measure(sampler(), STEPS, file))
    return read_measured(file)


if __name__ == "__main__":
    run_main(main)
