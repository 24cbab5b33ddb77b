"""What SDXL's steps need on TPU slices that are not there: python benchmarks/scale.py --table=scale.jsonl.

Runs launch/compile.py for each row of the table in docs/scale.md, the most wanted first, and appends what it says to
--table as soon as it is there; rows that are there already are left out, so that the same command goes on where it
stopped. A row takes minutes of one core and up to 10 GB of memory. --rows=TEXT: only those whose name has TEXT.
--largest goes on with twice the batch for each row that fits, until one does not; --markdown prints the table.
"""

import json
import re
import resource
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

TABLE = flags.DEFINE_string("table", "scale.jsonl", "File that rows are appended to.")
ROWS = flags.DEFINE_string("rows", "", "Only rows whose name has this text.")
LARGEST = flags.DEFINE_bool("largest", False, "Double the batch of each row for as long as it fits.")
WHOLE = flags.DEFINE_bool("whole", False, "Generate code, too: memory_analysis and the whole compile time.")
MARKDOWN = flags.DEFINE_bool("markdown", False, "Print the rows of --table as a table, and stop.")

ROOT = Path(__file__).parents[1]
CHIPS = {"v5e:4x4": 16, "v5e:8x8": 64, "v6e:4x4": 16, "v5p:2x2x4": 16}
MAX_PER_CHIP = 64
TOO_LARGE = re.compile("^error: .* does not fit: ")  # of launch/compile.py; its other errors say nothing of a row
# name: (variant of configs/sdxl.py for a LoRA, number of its stage, further settings)
STAGES = {
    "trajectories": ("", 1, ()),
    "mds": ("", 1, ("--config.states=mds",)),
    "student samples": ("", 4, ()),
    "reward, with decoder": ("all", 5, ("--config.preference.reward_model=clip=examples/emoji/scorer",)),
    "matching and discriminator": ("all", 6, ("--config.preference.reward_model=clip=examples/emoji/scorer",)),
}


class Row(NamedTuple):
    """One step to compile."""

    topology: str
    trainable: str
    work: str  # of STAGES
    per_chip: int

    @property
    def name(self) -> str:
        return f"{self.topology}, {self.trainable}, {self.work}, {self.per_chip}"

    def arguments(self) -> list[str]:
        """Of launch/compile.py."""
        variant, number, settings = STAGES[self.work]
        full = ("--config.trainable=full",) if variant and self.trainable == "full" else ()
        return [
            f"--config=configs/sdxl.py:{variant or self.trainable}",
            f"--topology={self.topology}",
            f"--config.batch_size={self.per_chip * CHIPS[self.topology]}",
            f"--stage={number}",
            *settings,
            *full,
        ]


def wanted() -> list[Row]:
    """All rows of a batch of one a chip, the most wanted first."""
    return [Row(topology, what, work, 1) for work in STAGES for topology in CHIPS for what in ("full", "lora")]


def read_rows(path: Path) -> dict[str, dict]:
    """The rows that are there, by their key."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["key"]: row for row in map(json.loads, lines)}


def measure(row: Row, path: Path) -> dict:
    """Run launch/compile.py for a row and append what it told, or that the step does not fit."""
    told = path.with_suffix(".row.json")
    told.unlink(missing_ok=True)
    how = () if WHOLE.value else ("--memory_only",)
    arguments = [*row.arguments(), *how]
    print(f"{row.name}: python launch/compile.py {' '.join(arguments)}", flush=True)
    start = time.time()
    result = subprocess.run(
        [sys.executable, "launch/compile.py", *arguments, f"--out={told.resolve()}"],
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
        preexec_fn=unlimited_stack,
    )
    entry = {"key": key_of(row), **row._asdict(), "command": " ".join(arguments), "date": str(date.today())}
    entry["jax"] = version("jax")
    if result.returncode == 0:
        entry |= json.loads(told.read_text())
        told.unlink()
    else:
        said = result.stderr.strip().splitlines()
        entry["error"] = next((line for line in reversed(said) if TOO_LARGE.search(line)), "")
        if not entry["error"]:
            sys.exit(f"{result.stderr[-3000:]}\n{row.name} ended with status {result.returncode}")
    with path.open("a") as file:
        file.write(json.dumps(entry | {"seconds": round(time.time() - start)}) + "\n")
    return entry


def key_of(row: Row) -> str:
    return row.name + (", whole" if WHOLE.value else "")


def unlimited_stack() -> None:
    """The TPU compiler's recursion at SDXL's size needs more than the usual 8 MB."""
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))


def table(rows: dict[str, dict]) -> str:
    """Markdown, in the order of the file."""
    heads = ("slice", "trained", "step", "images a chip", "arguments", "temporaries", "in all", "exchanged", "CPU time")
    lines = [heads, ("---",) * len(heads)]
    for row in rows.values():
        start = row["topology"], row["trainable"], row["work"], str(row["per_chip"])
        if "error" in row:
            lines.append((*start, "-", "-", "does not fit", "-", "-"))
            continue
        gb = [f"{row[part]:.2f}" for part in ("arguments_gb", "temporaries_gb", "used_gb")]
        exchanged = f"{sum(row['collectives_gb'].values()):.1f}"
        lines.append((*start, *gb, exchanged, f"{row['compile_cpu_seconds'] / 60:.1f} min"))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(_) -> None:
    path = Path(TABLE.value)
    rows = read_rows(path)
    if MARKDOWN.value:
        print(table(rows))
        return
    chosen = [row for row in wanted() if ROWS.value in row.name]
    if not chosen:
        sys.exit(f"error: --rows={ROWS.value} is in no row's name: write a part of one, such as {wanted()[0].name}.")
    for row in chosen:
        while ROWS.value in row.name and row.per_chip <= MAX_PER_CHIP:
            entry = rows.get(key_of(row)) or measure(row, path)
            if not LARGEST.value or "error" in entry:
                break
            row = row._replace(per_chip=2 * row.per_chip)


if __name__ == "__main__":
    app.run(main)
