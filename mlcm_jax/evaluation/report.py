"""What an evaluation leaves behind: results.json, results.md, a plot of each metric against the steps, and a grid."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mlcm_jax.evaluation.measure import Column
from mlcm_jax.evaluation.statistics.bootstrap import Figure
from mlcm_jax.hub.save import write_json
from mlcm_jax.images import write_image
from mlcm_jax.outputs import atomic_write
from mlcm_jax.plots import labelled_grid, plot_against_steps

THUMBNAIL = 256  # pixels; larger images are made smaller for the grid


@dataclasses.dataclass(frozen=True)
class Row:
    """A sampler at a number of steps, and its figures. sampler: "model" or "baseline"."""

    sampler: str
    num_steps: int
    scheduler: str
    guidance_scale: float
    figures: dict[Column, Figure]
    examples: UInt8[np.ndarray, "k H W 3"]

    @property
    def label(self) -> str:
        return f"{self.sampler} {self.num_steps} step{'s' if self.num_steps > 1 else ''}"


def relative(row: Row, reference: Row) -> dict[Column, Figure]:
    """Figures of ``row`` over the reference's, paired, but for those that compare with the reference itself.

    A figure that is not above 0 in all resamples of the reference has no ratio.
    """
    comparable = {column: figure for column, figure in reference.figures.items() if column.against != "baseline"}
    positive = {column: figure for column, figure in comparable.items() if min(figure.value, *figure.replicates) > 0}
    return {column: row.figures[column].over(figure) for column, figure in positive.items()}


def markdown(rows: Sequence[Row], reference: Row | None, networks: Mapping[str, str]) -> str:
    """A table for each thing that is compared with, then the ratios to the reference, then what the networks are.

    networks: by the name that figures have in the tables, what each one is.
    """
    columns = list(rows[0].figures)
    name = reference.label if reference else ""
    headings = {"data": "Against the real images", "baseline": f"Against {name}", "": "The images by themselves"}
    parts = []
    for against, heading in headings.items():
        if chosen := [column for column in columns if column.against == against]:
            parts.append(f"## {heading}\n\n" + _table(rows, chosen, _figures))
    if reference:
        others, chosen = [row for row in rows if row is not reference], list(relative(reference, reference))
        parts.append(
            f"## As parts of the figures of {name}\n\n" + _table(others, chosen, lambda row: relative(row, reference))
        )
    titles = {column.key: column.title for column in columns}
    notes = [f"- {titles.get(name, name)}: {what}" for name, what in networks.items()]
    return "\n".join([*parts, "## Networks\n\n" + "\n".join(notes) + "\n"])


def _figures(row: Row) -> dict[Column, Figure]:
    return row.figures


def _table(rows: Sequence[Row], columns: Sequence[Column], figures: Callable[[Row], Mapping[Column, Figure]]) -> str:
    arrows = {"higher": "\u2191", "lower": "\u2193", "near 1": "\u2192 1"}
    titles = [f"{column.title} {arrows[column.better]}" for column in columns]
    lines = ["| sampler | steps | " + " | ".join(titles) + " |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        mine = figures(row)
        cells = [_cell(mine[column], column.decimals) for column in columns]
        lines.append(f"| {row.sampler} | {row.num_steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(figure: Figure, decimals: int) -> str:
    rounded = [round(number, decimals) + 0.0 for number in (figure.value, *figure.interval)]  # no -0.0
    if not all(map(math.isfinite, rounded)):
        return f"{rounded[0]:.{decimals}f}" if math.isfinite(rounded[0]) else "-"
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*rounded, d=decimals)


def _json(figures: Mapping[Column, Figure]) -> dict[str, Any]:
    return {c.key: {"value": figure.value, "interval": list(figure.interval)} for c, figure in figures.items()}


def _json_row(row: Row, reference: Row | None) -> dict[str, Any]:
    settings = {"sampler": row.sampler, "steps": row.num_steps, "scheduler": row.scheduler}
    settings |= {"guidance_scale": row.guidance_scale, "figures": _json(row.figures)}
    return settings | ({"relative_to_reference": _json(relative(row, reference))} if reference else {})


def _thumbnails(images: UInt8[np.ndarray, "n H W 3"]) -> UInt8[np.ndarray, "n h w 3"]:
    if max(images.shape[1:3]) <= THUMBNAIL:
        return images
    return np.stack([np.asarray(Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL))) for image in images])


def write_report(
    rows: Sequence[Row], reference: Row | None, networks: Mapping[str, str], about: Mapping[str, Any], out: Path
) -> str:
    """Write all four files to ``out``, and return the tables.

    rows: the model's and the baseline's. reference: the row that others are compared with. networks: as ``markdown``
    takes them. about: what results.json says beside the figures.
    """
    columns = list(rows[0].figures)
    metrics = {c.key: {"title": c.title, "better": c.better, "against": c.against} for c in columns}
    settings = {"reference": reference.label if reference else None, "metrics": metrics, "columns": list(metrics)}
    settings["networks"] = dict(networks)
    write_json({**about, **settings, "rows": [_json_row(row, reference) for row in rows]}, out / "results.json")
    tables = markdown(rows, reference, networks)
    with atomic_write(out / "results.md") as f:
        f.write(tables.encode())
    plot_against_steps({_panel(column): _curves(rows, column) for column in columns}, out / "metrics.png")
    grid = labelled_grid({row.label: _thumbnails(row.examples) for row in rows}, blocks=2)
    write_image(grid, out / "grid.png")
    return tables


def _panel(column: Column) -> str:
    place = {"data": "\nto the real images", "baseline": "\nto the baseline's reference sample", "": "\n"}
    return column.title + place[column.against]


def _curves(rows: Sequence[Row], column: Column) -> dict[str, dict[int, tuple[float, float, float]]]:
    curves = {name: {} for name in dict.fromkeys(row.sampler for row in rows)}
    for row in sorted(rows, key=lambda row: row.num_steps):
        figure = row.figures[column]
        curves[row.sampler][row.num_steps] = (figure.value, *figure.interval)
    return curves
