"""What an evaluation leaves behind: results.json, results.md, a plot of each metric against the steps, and a grid."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mlcm_jax.evaluation.measure import Figure
from mlcm_jax.hub.save import write_json
from mlcm_jax.plots import labelled_grid, plot_against_steps

THUMBNAIL = 256  # pixels; larger pictures are made smaller for the grid


class Metric(NamedTuple):
    """How a metric is shown. better: "higher", "lower" or "near 1"."""

    title: str
    better: str
    decimals: int


METRICS = {
    "clip_score": Metric("CLIP score", "higher", 4),
    "seconds_per_image": Metric("seconds an image", "lower", 4),
    "diversity": Metric("diversity", "higher", 4),
    "latent_mse": Metric("latent distance", "lower", 4),
    "perceptual_distance": Metric("perceptual distance", "lower", 4),
    "frechet_distance": Metric("Frechet distance", "lower", 3),
    "kernel_distance": Metric("kernel distance (KID)", "lower", 4),
    "precision": Metric("precision", "higher", 3),
    "recall": Metric("recall", "higher", 3),
    "high_frequency_energy": Metric("high-frequency energy", "near 1", 3),
    "noise_level": Metric("noise level", "near 1", 3),
    "background_noise": Metric("background noise", "near 1", 3),
}
PAIRWISE = ("latent_mse", "perceptual_distance")  # with the baseline's long result, picture by picture


@dataclasses.dataclass(frozen=True)
class Row:
    """A sampler and its figures. who: "model" or "baseline"."""

    who: str
    num_steps: int
    scheduler: str
    guidance_scale: float
    figures: dict[str, Figure]
    examples: UInt8[np.ndarray, "k H W 3"]

    @property
    def label(self) -> str:
        return f"{self.who} {self.num_steps} step{'s' if self.num_steps > 1 else ''}"


def metric(key: str) -> Metric:
    """How the figure of this name is shown."""
    name, _, rest = key.partition("/")
    extractor = rest.partition("/")[0]
    shown = METRICS.get(name) or Metric(name.replace("_", " "), "higher", 4)  # any scorer's
    return shown._replace(title=f"{shown.title}, {extractor}") if extractor else shown


def against(key: str) -> str:
    """What the figure of this name compares with: "data", "baseline" or nothing ("")."""
    return "baseline" if key in PAIRWISE else key.rpartition("/")[2] if "/" in key else ""


def relative(row: Row, reference: Row) -> dict[str, Figure]:
    """The row's figures over the reference's, paired, but for those that compare with the reference itself.

    A figure that is not above 0 in all resamples of the reference has no ratio.
    """
    comparable = {key: figure for key, figure in reference.figures.items() if against(key) != "baseline"}
    positive = {key: figure for key, figure in comparable.items() if min(figure.value, *figure.replicates) > 0}
    return {key: row.figures[key].over(figure) for key, figure in positive.items()}


def markdown(rows: Sequence[Row], reference: Row | None, networks: Mapping[str, str]) -> str:
    """A table for each thing that is compared with, then the ratios to the reference, then what the networks are.

    networks: by the name that figures have in the tables, what each one is.
    """
    keys = list(rows[0].figures)
    name = reference.label if reference else ""
    headings = {"data": "Against the real pictures", "baseline": f"Against {name}", "": "The pictures by themselves"}
    parts = []
    for group, heading in headings.items():
        if chosen := [key for key in keys if against(key) == group]:
            parts.append(f"## {heading}\n\n" + _table(rows, chosen, _figures))
    if reference:
        others, chosen = [row for row in rows if row is not reference], list(relative(reference, reference))
        parts.append(
            f"## As parts of the figures of {name}\n\n" + _table(others, chosen, lambda row: relative(row, reference))
        )
    notes = [f"- {metric(name).title if name in keys else name}: {what}" for name, what in networks.items()]
    return "\n".join([*parts, "## Networks\n\n" + "\n".join(notes) + "\n"])


def _figures(row: Row) -> dict[str, Figure]:
    return row.figures


def _table(rows: Sequence[Row], keys: Sequence[str], figures: Callable[[Row], Mapping[str, Figure]]) -> str:
    arrows = {"higher": "\u2191", "lower": "\u2193", "near 1": "\u2192 1"}
    titles = [f"{metric(key).title} {arrows[metric(key).better]}" for key in keys]
    lines = ["| sampler | steps | " + " | ".join(titles) + " |", "|---" * (len(keys) + 2) + "|"]
    for row in rows:
        mine = figures(row)
        cells = [_cell(mine[key], metric(key).decimals) for key in keys]
        lines.append(f"| {row.who} | {row.num_steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(figure: Figure, decimals: int) -> str:
    rounded = (round(number, decimals) + 0.0 for number in (figure.value, *figure.interval))  # no -0.0
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*rounded, d=decimals)


def _json(figures: Mapping[str, Figure]) -> dict[str, Any]:
    return {key: {"value": figure.value, "interval": list(figure.interval)} for key, figure in figures.items()}


def _json_row(row: Row, reference: Row | None) -> dict[str, Any]:
    settings = {"sampler": row.who, "steps": row.num_steps, "scheduler": row.scheduler}
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

    rows: the model's and the baseline's. reference: the row of the baseline's long result. networks: as ``markdown``
    takes them. about: what results.json says beside the figures.
    """
    out.mkdir(parents=True, exist_ok=True)
    keys = list(rows[0].figures)
    metrics = {key: {"title": metric(key).title, "better": metric(key).better, "against": against(key)} for key in keys}
    settings = {"reference": reference.label if reference else None, "metrics": metrics, "columns": keys}
    settings["networks"] = dict(networks)
    write_json({**about, **settings, "rows": [_json_row(row, reference) for row in rows]}, out / "results.json")
    tables = markdown(rows, reference, networks)
    (out / "results.md").write_text(tables, encoding="utf-8")
    plot_against_steps({_panel(key): _curves(rows, key) for key in keys}, out / "metrics.png")
    grid = labelled_grid({row.label: _thumbnails(row.examples) for row in rows}, blocks=2)
    Image.fromarray(grid).save(out / "grid.png")
    return tables


def _panel(key: str) -> str:
    place = {"data": "\nto the real pictures", "baseline": "\nto the baseline's long result", "": "\n"}[against(key)]
    return f"{metric(key).title}{place}"


def _curves(rows: Sequence[Row], key: str) -> dict[str, dict[int, tuple[float, float, float]]]:
    names = dict.fromkeys(row.who for row in rows)
    figures = {who: {row.num_steps: row.figures[key] for row in rows if row.who == who} for who in names}
    return {who: {n: (f.value, *f.interval) for n, f in sorted(mine.items())} for who, mine in figures.items()}
