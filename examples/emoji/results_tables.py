"""Write the tables of README.md and docs/results.md between their markers, from the evaluations' results.json."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlcm_jax.errors import UserError
from mlcm_jax.hub.load import read_json
from mlcm_jax.images import open_image

STUDENT_STEPS = (8, 4, 2, 1)
SAMPLERS = {"model": "student", "baseline": "teacher"}


class Column(NamedTuple):
    """A figure of results.json. ratio: as a part of the teacher's 25-step sample, paired."""

    title: str
    key: str
    decimals: int
    ratio: bool = False
    interval: bool = True


FRECHET = Column("Frechet distance", "frechet_distance/efficientnet/data", 1)
RATIO = Column("to the teacher's 25 steps", "frechet_distance/efficientnet/data", 2, ratio=True)
INDEPENDENT = (
    FRECHET,
    RATIO,
    Column("KID x 1,000", "kernel_distance/efficientnet/data", 1),
    Column("precision", "precision/efficientnet/data", 2, interval=False),
    Column("recall", "recall/efficientnet/data", 2, interval=False),
    Column("high-frequency energy", "high_frequency_energy/pixels/data", 2),
    Column("background noise", "background_noise/pixels/data", 2),
)
TEXT = (
    Column("CLIP score (held-out)", "clip-guard_score", 3),
    Column("CLIP score (scorer)", "clip_score", 3),
    Column("Frechet distance (scorer)", "frechet_distance/clip/data", 1),
    Column("latent distance", "latent_mse", 3),
)
SHORT = (FRECHET, Column("CLIP score", "clip-guard_score", 3))


def cell(row: Mapping[str, Any], column: Column) -> str:
    """A figure as text, with its 95 % interval."""
    figures = row.get("relative_to_reference", {}) if column.ratio else row["figures"]
    if column.key not in figures:
        return "-"
    figure, factor = figures[column.key], 1000 if "1,000" in column.title else 1
    value, (low, high) = factor * figure["value"], (factor * bound for bound in figure["interval"])
    text = f"{value:.{column.decimals}f}"
    return f"{text} ({low:.{column.decimals}f} to {high:.{column.decimals}f})" if column.interval else text


def table(rows: Sequence[tuple[str, Mapping[str, Any]]], columns: Sequence[Column]) -> str:
    """A Markdown table. rows: a name and a row of results.json each."""
    lines = ["| sampler | steps | " + " | ".join(column.title for column in columns) + " |"]
    lines.append("|---" * (2 + len(columns)) + "|")
    for name, row in rows:
        lines.append(f"| {name} | {row['steps']} | " + " | ".join(cell(row, column) for column in columns) + " |")
    return "\n".join(lines)


def rows_of(results: Mapping[str, Any], sampler: str, steps: Sequence[int]) -> list[Mapping[str, Any]]:
    """The rows of a sampler ("model" or "baseline") at these numbers of steps."""
    found = {row["steps"]: row for row in results["rows"] if row["sampler"] == sampler}
    return [found[n] for n in steps if n in found]


def provenance(results: Mapping[str, Any]) -> str:
    """When and on what an evaluation ran."""
    hardware = results["hardware"]
    device = hardware["jax_devices"][0]
    on = f"{hardware['cores']} CPU cores" if device == "cpu" else device
    return f"Measured on {results['date']}, {on}, jax {results['versions']['jax']}."


def both_samplers(results: Mapping[str, Any], columns: Sequence[Column]) -> str:
    """Teacher and student at all their numbers of steps."""
    rows = [
        (SAMPLERS[sampler], row)
        for sampler in ("baseline", "model")
        for row in rows_of(results, sampler, (25, 8, 4, 3, 2, 1))
    ]
    return table(rows, columns)


def short_table(results: Mapping[str, Any]) -> str:
    """README.md's five rows."""
    rows = [("teacher", row) for row in rows_of(results, "baseline", (25, 4))]
    rows += [("student", row) for row in rows_of(results, "model", (4, 2, 1))]
    return table(rows, SHORT)


def stages_table(out: Path, teacher: Mapping[str, Any]) -> str:
    """The paper's stages on trajectories, each at its end."""
    folders = sorted((out / "stage_evals").iterdir(), key=lambda folder: int(folder.name))
    rows = [
        (f"stage {folder.name}", row)
        for folder in folders
        for row in rows_of(read_json(folder / "results.json"), "model", STUDENT_STEPS)
    ]
    rows += [("teacher", row) for row in rows_of(teacher, "baseline", (25,))]
    return table(rows, [FRECHET, *INDEPENDENT[2:], *TEXT[:2]])


def unguided_table(out: Path, full: Mapping[str, Any]) -> str:
    """The full recipe's student beside the teacher that is sampled like it."""
    measured = read_json(out / "unguided_eval" / "results.json")
    rows = [
        (label, row)
        for label, of in {"teacher without guidance": measured, "student": full}.items()
        for row in rows_of(of, "model", (25, *STUDENT_STEPS))
    ]
    return f"{table(rows, [FRECHET, *INDEPENDENT[2:], *TEXT[:2]])}\n\n{provenance(measured)}"


def lcm_table(out: Path, full: Mapping[str, Any]) -> str:
    """The full recipe's student beside LCM at equal work and with equally many examples."""
    students = {"student": full}
    students |= {
        label: read_json(out / f"{name}_eval" / "results.json")
        for label, name in {"LCM, equal work": "lcm", "LCM, equal examples": "lcm_equal_examples"}.items()
    }
    rows = [(label, row) for label, of in students.items() for row in rows_of(of, "model", STUDENT_STEPS)]
    return f"{table(rows, [FRECHET, *INDEPENDENT[2:], *TEXT[:3]])}\n\n{provenance(students['LCM, equal examples'])}"


def blocks(out: Path) -> Iterator[tuple[str, str, str]]:
    """File, marker and text of each table whose evaluations are there; the two students' have to be."""
    full, default = (read_json(out / f"{name}_eval" / "results.json") for name in ("full", "default"))
    results = "docs/results.md"
    yield "README.md", "short", f"{short_table(full)}\n\n{provenance(full)}"
    for name, measured in {"default": default, "full": full}.items():
        yield results, f"{name} independent", f"{both_samplers(measured, INDEPENDENT)}\n\n{provenance(measured)}"
        yield results, f"{name} text", both_samplers(measured, TEXT)
    if all((out / f"{name}_eval" / "results.json").is_file() for name in ("lcm", "lcm_equal_examples")):
        yield results, "lcm", lcm_table(out, full)
    if (out / "unguided_eval" / "results.json").is_file():
        yield results, "unguided", unguided_table(out, full)
    if (out / "stage_evals").is_dir():
        yield results, "stages", stages_table(out, full)


def replace_block(text: str, marker: str, content: str, file: str) -> str:
    """``text`` with new content between <!-- begin: marker --> and <!-- end: marker -->.

    Raises UserError where the markers are not there exactly once.
    """
    begin, end = f"<!-- begin: {marker} -->", f"<!-- end: {marker} -->"
    pattern = re.compile(f"(?<={re.escape(begin)}\n).*?(?={re.escape(end)})", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise UserError(f"{file} needs the markers {begin} and {end} once each, on lines of their own.")
    return pattern.sub(lambda _: content.rstrip() + "\n", text)


def copy_image(source: Path, target: Path) -> None:
    """In 256 colours, to be small."""
    open_image(source).quantize(256).save(target, optimize=True)


def put_into_page(page: Path, marker: str, text: str, pictures: Sequence[Path] = ()) -> None:
    """Put a text between its markers, with links to pictures below it, and the pictures beside the page."""
    for file in pictures:
        copy_image(file, page.with_name(file.name))
    links = [f"![{file.stem.replace('_', ' ')}]({file.name})" for file in pictures]
    content = "\n\n".join([text.rstrip(), *links])
    page.write_text(replace_block(page.read_text(encoding="utf-8"), marker, content, str(page)), encoding="utf-8")


def write_all(out: Path, root: Path) -> None:
    """Write every table into its file below ``root``; out: the folder of reproduce.py's results."""
    for name, marker, content in blocks(out):
        put_into_page(root / name, marker, content)
        print(f"{name}: {marker}")
