"""The grids and plots that a run leaves behind."""

from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib
import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from mlcm_jax.outputs import atomic_write

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

MANY = 10  # as many lines have colours of their own
LINE_STYLES = (("o-", "s--"), ("^:", "D-."))


def labelled_grid(
    columns: Mapping[str, UInt8[np.ndarray, "n H W 3"]], *, blocks: int = 1
) -> UInt8[np.ndarray, "H W 3"]:
    """A row for each image, a column for each label; the rows are set in ``blocks`` side by side."""
    names, images = list(columns), _zoomed(np.stack(list(columns.values()), axis=1))
    n, count, height, width, _ = images.shape
    rows, gap, header = -(-n // blocks), 4, 28
    block_width = count * (width + gap) + 4 * gap
    canvas = Image.new("RGB", (blocks * block_width, header + rows * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for i in range(n):
        block, row = divmod(i, rows)
        for column, name in enumerate(names):
            x, y = block * block_width + column * (width + gap), header + row * (height + gap)
            canvas.paste(Image.fromarray(images[i, column]), (x, y))
            if row == 0:
                draw.text((x + 2, 2), name.replace(" ", "\n", 1), fill="black")
    return np.asarray(canvas)


def labelled_rows(rows: Mapping[str, UInt8[np.ndarray, "n H W 3"]]) -> UInt8[np.ndarray, "H W 3"]:
    """A row of images for each label, which stands on its left."""
    images = _zoomed(np.stack(list(rows.values())))
    _, n, height, width, _ = images.shape
    gap, font, labels = 4, ImageFont.load_default(), [label.replace(" ", "\n", 1) for label in rows]
    margin = 2 * gap + round(max(font.getlength(line) for label in labels for line in label.split("\n")))
    canvas = Image.new("RGB", (margin + n * (width + gap), len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(labels):
        draw.text((gap, row * (height + gap) + height // 2 - 12), label, fill="black", font=font)
        for column in range(n):
            place = margin + column * (width + gap), row * (height + gap)
            canvas.paste(Image.fromarray(images[row, column]), place)
    return np.asarray(canvas)


def _zoomed(images: UInt8[np.ndarray, "a b H W 3"]) -> UInt8[np.ndarray, "a b H W 3"]:
    """Small images repeated to a size that can be seen."""
    zoom = max(1, 96 // images.shape[2])
    return images.repeat(zoom, axis=2).repeat(zoom, axis=3)


def plot_loss(metrics: Sequence[Mapping[str, float]], path: epath.PathLike) -> None:
    """The loss against the step, with its running mean."""
    steps, losses = (np.array([m[key] for m in metrics]) for key in ("step", "loss"))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, alpha=0.35, label="loss of the step")
    window = max(1, len(losses) // 20)
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :], mean, label=f"mean of {window} logged steps")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    _write(figure, path)


def plot_closeness(panels: Mapping[str, Mapping[str, Mapping[int, float]]], path: epath.PathLike) -> None:
    """Distances against the number of steps, side by side.

    panels: name of the distance -> sampler ("student", "teacher") -> number of steps -> value.
    """
    exact = {
        panel: {name: {n: (value, value, value) for n, value in values.items()} for name, values in curves.items()}
        for panel, curves in panels.items()
    }
    plot_against_steps(exact, path)


def plot_against_steps(
    panels: Mapping[str, Mapping[str, Mapping[int, tuple[float, float, float]]]],
    path: epath.PathLike,
    *,
    axes_of: Mapping[str, Literal["log", "tight"]] | None = None,
) -> None:
    """Figures against the number of sampling steps, a panel each; two panels a row for many samplers, four for few.

    panels: name of the figure -> sampler -> number of steps -> value and both ends of its interval. axes_of: figures
    whose axis does not begin at 0: it is logarithmic, or as long as the values need. Up to 20 samplers look different.
    """
    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    columns = min(len(panels), 4 if len(labels) <= MANY else 2)
    rows, size = -(-len(panels) // columns), (6 if columns < 4 else 4.2)
    figure, all_axes = plt.subplots(
        rows, columns, figsize=(size * columns + 1.5, 4 * rows), layout="constrained", squeeze=False
    )
    for axes in all_axes.flat[len(panels) :]:
        axes.remove()
    lines: dict[str, ErrorbarContainer] = {}
    for axes, (name, curves) in zip(all_axes.flat, panels.items(), strict=False):
        for label, values in curves.items():
            i = labels.index(label)
            value, low, high = np.array(list(values.values())).T
            errors = np.maximum([value - low, high - value], 0)
            beside = 1 + 0.02 * (i - (len(labels) - 1) / 2)  # so that intervals do not hide each other
            places, style = beside * np.array(list(values)), LINE_STYLES[i // MANY % 2][i % 2]
            lines[label] = axes.errorbar(places, value, errors, fmt=style, color=f"C{i}", capsize=3)
        ticks = sorted({n for values in curves.values() for n in values})
        bottom = min(0, *(low for values in curves.values() for _, low, _ in values.values()))
        axes.set(xlabel="sampling steps", ylabel=name)
        scale = (axes_of or {}).get(name)
        if scale is None:
            axes.set_ylim(bottom, None)
        elif scale == "log":
            axes.set_yscale("log")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, labels=[str(n) for n in ticks])
    figure.legend(handles=list(lines.values()), labels=list(lines), loc="outside right upper")
    _write(figure, path)


def _write(figure: Figure, path: epath.PathLike) -> None:
    with atomic_write(path) as f:
        figure.savefig(f, dpi=110, format="png")
    plt.close(figure)
