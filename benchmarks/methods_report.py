"""What benchmarks/methods.py writes: results.json, tables, a figure and grids, of what there is so far."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from comparison import REFERENCE_STEPS, Measured, over_seeds, paired_ratio, read_measured
from methods_tasks import BASELINES, TEACHER_NAME, Benchmark, image_file, plan_file, run_folder

from examples.emoji.results_tables import FRECHET, RATIO, TEXT, Column, cell, provenance, put_into_page, table
from mlcm_jax.evaluation.statistics.bootstrap import Figure
from mlcm_jax.hub.load import read_json
from mlcm_jax.hub.save import write_json
from mlcm_jax.images import write_image
from mlcm_jax.outputs import atomic_write
from mlcm_jax.plots import labelled_rows, plot_against_steps

COLUMNS = (FRECHET, *TEXT)
COMPARED_WITH = "mlcm"
OVER = f"Frechet distance over {COMPARED_WITH}'s"
FAILED_ABOVE = 3.0  # of that, at each number of steps: left out of the figure, where the others would be one line
AXES: dict[str, Literal["log", "tight"]] = {  # of the figure's panels
    "Frechet distance": "log",
    OVER: "tight",
    "CLIP score (held-out)": "tight",
    "latent distance": "log",
}
GRID_STEPS, GRID_IMAGES = (4, 1), 12
DOCS, MARKER = "docs/methods.md", "equal work"


def write_report(
    benchmark: Benchmark,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    failed: Mapping[str, str],
    unfinished: Sequence[str],
) -> str:
    """Write results.json and methods.md; returns the tables. failed: why, by task. unfinished: names of tasks."""
    runs = read_runs(methods, seeds, out)
    plans = {name: read_json(plan_file(out, name)) for name in methods if plan_file(out, name).is_file()}
    rows = [row for name, measured in runs.items() for row in rows_of(name, measured)]
    about = out / TEACHER_NAME / "about.json"
    results = (read_json(about) if about.is_file() else {}) | {"settings": read_json(out / "settings.json")}
    results |= {"methods": plans, "failed": dict(failed), "unfinished": list(unfinished), "rows": rows}
    results |= {f"over_{COMPARED_WITH}": ratios(runs, benchmark.steps)}
    write_json(results, out / "results.json")
    text = markdown(results, list(runs), benchmark.steps)
    with atomic_write(out / "methods.md") as f:
        f.write(text.encode())
    return text


def write_pictures(methods: Sequence[str], seeds: Sequence[int], out: Path) -> None:
    """Write the figure, of results.json, and the grids, of the first seed."""
    plot_against_steps(panels(read_json(out / "results.json")), out / "methods.png", axes_of=AXES)
    for num_steps in GRID_STEPS:
        _write_grid([*BASELINES, *methods], seeds[0], num_steps, out)


def read_runs(methods: Sequence[str], seeds: Sequence[int], out: Path) -> dict[str, dict[str, Measured]]:
    """Figures of each seed's run, by method, of those that have some; the baselines first."""
    found = {
        name: {str(seed): read_measured(run_folder(out, name, seed) / "figures.json") for seed in seeds}
        for name in (*BASELINES, *methods)
    }
    measured = {name: {seed: run for seed, run in runs.items() if run} for name, runs in found.items()}
    return {name: runs for name, runs in measured.items() if runs}


def rows_of(name: str, runs: Mapping[str, Measured]) -> Iterator[dict[str, Any]]:
    """Rows as results.json of launch/evaluate.py has them: at each number of steps, the mean over seeds."""
    counts = {int(n) for run in runs.values() for n in run}
    for n in sorted(counts, reverse=True):
        there = {seed: run for seed, run in runs.items() if str(n) in run}
        keys = next(iter(there.values()))[str(n)]
        figures = {key: _json(over_seeds(there, n, key), there, n, key) for key in keys}
        yield {"sampler": name, "steps": n, "seeds": list(there), "figures": figures}


def _json(figure: Figure, runs: Mapping[str, Measured], num_steps: int, key: str) -> dict[str, Any]:
    by_seed = {seed: run[str(num_steps)][key]["value"] for seed, run in runs.items()}
    return {"value": figure.value, "interval": list(figure.interval), "by_seed": by_seed}


def ratios(runs: Mapping[str, Mapping[str, Measured]], steps: Sequence[int]) -> dict[str, dict[str, Any]]:
    """The Frechet distance of each sampler over MLCM's at as many steps, paired, by sampler and number of steps."""
    found: dict[str, dict[str, Any]] = {}
    theirs = runs.get(COMPARED_WITH, {})
    for name, measured in runs.items():
        for n in steps if name != COMPARED_WITH else ():
            if ratio := paired_ratio(measured, theirs, n, FRECHET.key):
                found.setdefault(name, {})[str(n)] = {"value": ratio.value, "interval": list(ratio.interval)}
    return found


def ratio_table(ratios: Mapping[str, Mapping[str, Any]], steps: Sequence[int]) -> str:
    """Rows are samplers, columns numbers of steps."""
    ordered = sorted(steps, reverse=True)
    heads = " | ".join(f"{n} step{'s' * (n > 1)}" for n in ordered)
    lines = [f"| {OVER} | {heads} |", "|---" * (1 + len(ordered)) + "|"]
    for name, by_steps in ratios.items():
        found = ({RATIO.key: by_steps[str(n)]} if str(n) in by_steps else {} for n in ordered)
        cells = " | ".join(cell({"relative_to_reference": ratio}, RATIO) for ratio in found)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def markdown(results: Mapping[str, Any], names: Sequence[str], steps: Sequence[int]) -> str:
    """The work of each method, the figures, the methods at equal numbers of steps below one another, and ratios."""
    rows = results["rows"]
    ordered = [row for n in (REFERENCE_STEPS, *sorted(steps, reverse=True)) for row in rows if row["steps"] == n]
    lines = ["| method | training steps | examples a step | TFLOP | seeds |", "|---|---|---|---|---|"]
    for name, plan in results["methods"].items():
        seeds = max((len(row["seeds"]) for row in rows if row["sampler"] == name), default=0)
        starts = "".join(f", stage from {start}" for start in plan["starts"][1:])
        lines.append(f"| {name} | {plan['num_steps']}{starts} | {plan['batch_size']} | {plan['tflop']:.4g} | {seeds} |")
    parts = ["\n".join(lines), table([(row["sampler"], row) for row in ordered], COLUMNS)]
    paired = results[f"over_{COMPARED_WITH}"]
    parts += [ratio_table(paired, steps)] if paired else []
    parts += [f"- Failed: {name}: {reason}" for name, reason in results["failed"].items()]
    parts += [f"- Not finished: {', '.join(results['unfinished'])}."] if results["unfinished"] else []
    parts += [provenance(results)] if "hardware" in results else []
    return "\n\n".join(parts) + "\n"


Curve = dict[int, tuple[float, float, float]]  # number of steps -> value and both ends of its interval


def panels(results: Mapping[str, Any]) -> dict[str, dict[str, Curve]]:
    """What ``plot_against_steps`` takes: a panel for each measured figure, a line for each method that works."""
    paired = results[f"over_{COMPARED_WITH}"]
    works = {name: of for name, of in paired.items() if min(r["value"] for r in of.values()) <= FAILED_ABOVE}
    rows = [row for row in results["rows"] if row["sampler"] in works or row["sampler"] not in paired]
    found = {column.title: curves(rows, column) for column in COLUMNS}
    found[OVER] = {name: {int(n): _point(ratio) for n, ratio in of.items()} for name, of in works.items()}
    return {title: found[title] for title in AXES if found[title]}


def curves(rows: Sequence[Mapping[str, Any]], column: Column) -> dict[str, Curve]:
    """A figure by sampler and number of steps. Those of 0 are left out where the axis is logarithmic."""
    found: dict[str, Curve] = {}
    for row in rows:
        figure = row["figures"].get(column.key)
        if figure and (figure["value"] > 0 or AXES.get(column.title) != "log"):
            found.setdefault(row["sampler"], {})[row["steps"]] = _point(figure)
    return found


def _point(figure: Mapping[str, Any]) -> tuple[float, float, float]:
    low, high = figure["interval"]
    return figure["value"], low, high


def _write_grid(names: Sequence[str], seed: int, num_steps: int, out: Path) -> None:
    """A row for each method: the first prompts at a number of steps, below the teacher's reference sample."""
    steps = f"{num_steps} step{'s' * (num_steps > 1)}"
    files = {f"{TEACHER_NAME}, {REFERENCE_STEPS} steps": image_file(out / TEACHER_NAME, REFERENCE_STEPS)}
    files |= {f"{name}, {steps}": image_file(run_folder(out, name, seed), num_steps) for name in names}
    found = {label: np.load(file)[:GRID_IMAGES] for label, file in files.items() if file.is_file()}
    if len(found) > 1:
        write_image(labelled_rows(found), out / f"methods_grid_{num_steps}.png")


def put_into_docs(out: Path, root: Path) -> None:
    """Put the tables between their markers, and the figure and the grids beside them."""
    pictures = [out / "methods.png", *sorted(out.glob("methods_grid_*.png"), reverse=True)]
    put_into_page(root / DOCS, MARKER, (out / "methods.md").read_text(), pictures)
