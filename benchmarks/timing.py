"""Timing two programs in turns, so that a change of the machine's speed hits both; the table and the report."""

import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# XLA takes three quarters of a GPU's memory at the start, and torch needs some. Read at the first use of a device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

WARM_UP = 2
PEAK_SIDE = 8192  # of the square matrices whose product's rate is the peak
PEAK_REPEATS = 20


class Side(NamedTuple):
    """run: does the work ``count`` times, to the end. memory: bytes that it needs on the device at most, None if
    unknown."""

    run: Callable[[], Any]
    memory: Callable[[], int | None]
    count: int = 1


class Timing(NamedTuple):
    """Seconds of each run."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        low, _, high = quartiles(self.seconds)
        return f"{shown(self.median)} ({shown(low)} to {shown(high)})"


def shown(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def time_in_turns(sides: Mapping[str, Side], repeats: int) -> dict[str, Timing]:
    """The sides one after the other, ``repeats`` times, after ``WARM_UP`` turns that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(WARM_UP + repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            side.run()
            if turn >= WARM_UP:
                seconds[name].append((time.perf_counter() - start) / side.count)
    return {name: Timing(values) for name, values in seconds.items()}


def compare(
    ours: Side, theirs: Mapping[str, Callable[[], Side]], repeats: int, deadline: float
) -> Iterator[dict[str, Any]]:
    """Figures of our side alone, then also of ours with each of theirs, which are built one at a time.

    What fails there, or has not begun at ``deadline`` (time.monotonic()), is named with its reason.
    """
    result: dict[str, Any] = {"ours": _figures(time_in_turns({"ours": ours}, repeats)["ours"], ours)}
    yield result
    for name, build in theirs.items():
        result = result | {name: _with_ours(ours, name, build, repeats, deadline)}
        yield result


def _with_ours(ours: Side, name: str, build: Callable[[], Side], repeats: int, deadline: float) -> dict[str, Any]:
    if time.monotonic() > deadline:
        return {"error": "not run: out of time"}
    try:
        side = build()
        timings = time_in_turns({"ours": ours, name: side}, repeats)
    except Exception as error:  # of a compiler, say: whatever it is, the table names it
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    pairs = zip(timings[name].seconds, timings["ours"].seconds, strict=True)
    low, middle, high = quartiles([t / o for t, o in pairs])
    figures = _figures(timings[name], side) | {"ratio": middle, "ratio_quartiles": [low, high]}
    return figures | {"ours": _figures(timings["ours"], ours)}


def _figures(timing: Timing, side: Side) -> dict[str, Any]:
    figures = {"seconds": timing.median, "quartiles": quartiles(timing.seconds)[::2], "shown": str(timing)}
    return figures | {"memory": side.memory()}


def compiled_memory(compiled: Any) -> int | None:
    """Bytes of arguments, results and temporaries of a compiled JAX program."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return used - memory.alias_size_in_bytes


def same_precision(dtype: str):
    """A context in which products of float32 are not rounded to less, which is jax's habit on a GPU, not torch's."""
    return jax.default_matmul_precision("highest" if dtype == "float32" else None)


def torch_sides(compiled: bool) -> dict[str, bool]:
    """The reference's sides by name, with whether torch compiles; none where a package is missing."""
    if torch_missing():
        return {}
    return {"torch": False} | ({"torch.compile": True} if compiled else {})


def torch_missing() -> str:
    """What the reference needs and this Python has not."""
    needed = ("torch", "diffusers", "peft")
    return ", ".join(name for name in needed if importlib.util.find_spec(name) is None)


def torch_device() -> str:
    """The same kind of device as JAX's, and on a CPU as many threads: one a core that the process may use."""
    import torch

    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 on both sides
    if jax.default_backend() == "gpu" and torch.cuda.is_available():
        return "cuda"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return "cpu"


def torch_side(run: Callable[[], Any], device: str, count: int = 1) -> Side:
    """A side that waits for the device after ``count`` runs; its memory is torch's own peak."""
    import torch

    def to_the_end():
        *_, last = (run() for _ in range(count))
        if device != "cpu":
            torch.cuda.synchronize()
        return last

    if device == "cpu":
        return Side(to_the_end, _unknown, count)
    torch.cuda.reset_peak_memory_stats()
    return Side(to_the_end, torch.cuda.max_memory_allocated, count)


def _unknown() -> None:
    return None


def notes(program: str, missing: str) -> dict[str, Any]:
    """What stands above a table: the command, the machine, versions, and what could not be measured.

    missing: packages that torch's side needs and that are not there.
    """
    return command_notes(program, missing) | machine()


def command_notes(program: str, missing: str | None = None) -> dict[str, Any]:
    """The part of ``notes`` that asks no device; missing: None finds out."""
    missing = torch_missing() if missing is None else missing
    versions = {name: importlib.metadata.version(name) for name in ("jax", "torch", "diffusers") if name not in missing}
    command = " ".join(["python", f"benchmarks/{program}", *sys.argv[1:]])
    said = {"command": command, "versions": ", ".join(f"{k} {v}" for k, v in versions.items())}
    return said | ({"torch's side": f"not measured: without {missing}"} if missing else {})


def device_memory() -> int | None:
    """JAX's peak on the first device since the start of the process; None on a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0))
    hardware = f"{cores} CPU core{'s' * (cores > 1)} ({cpu})" if device.platform == "cpu" else device.device_kind
    return {"hardware": hardware, "date": str(datetime.date.today()), "python": platform.python_version()}


@functools.cache
def measured_peak() -> float | None:
    """FLOP/s of large bfloat16 products on the first device, by the fastest of some; None on a CPU."""
    if jax.default_backend() == "cpu":
        return None
    square = jax.random.normal(jax.random.key(0), (PEAK_SIDE, PEAK_SIDE), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(WARM_UP + PEAK_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(product(square, square))
        seconds.append(time.perf_counter() - start)
    return 2 * PEAK_SIDE**3 / min(seconds)


def compile_timed(jitted: Any, *args: Any) -> tuple[Any, dict[str, float]]:
    """A jit-ed function compiled for its arguments or their shapes; seconds of tracing and of compiling."""
    start = time.perf_counter()
    lowered = jitted.lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    return compiled, {"trace_seconds": traced - start, "compile_seconds": time.perf_counter() - traced}


HEADER = ["work", "ours", "torch", "ratio", "torch.compile", "ratio", "images/s, ours", "memory, ours", "torch"]


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of a Markdown table; a ratio above 1 says that ours took less time."""
    header = [*HEADER, "TFLOP/s, ours", "of peak"]
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        cells = [row["work"], row["ours"]["shown"]]
        for name in ("torch", "torch.compile"):
            cells += _side_cells(row.get(name))
        cells += [f"{row['images'] / row['ours']['seconds']:.3g}"]
        cells += [_gigabytes((row.get(name) or {}).get("memory")) for name in ("ours", "torch")]
        rate, peak = row["flops"] / row["ours"]["seconds"], row.get("peak_flops")
        cells += [f"{rate / 1e12:.3g}", f"{rate / peak:.0%}" if peak else "-"]
        yield "| " + " | ".join(cells) + " |"


def _side_cells(side: dict[str, Any] | None) -> list[str]:
    if side is None:
        return ["-", "-"]
    if "error" in side:
        return [side["error"].replace("|", "/"), "-"]
    low, high = side["ratio_quartiles"]
    return [side["shown"], f"{side['ratio']:.2f} ({low:.2f} to {high:.2f})"]


def _gigabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e9:.2f} GB"


class Report:
    """name.md and name.json in the folder ``out``, written anew whenever a row has got further."""

    def __init__(self, out: Path, name: str, notes: dict[str, Any]):
        self.out, self.name, self.notes, self.rows = out, name, notes, []
        out.mkdir(parents=True, exist_ok=True)

    def add_row(self, states: Iterable[dict[str, Any]]) -> None:
        """Write each of a row's states, so that a process that is stopped leaves what it had measured."""
        self.rows.append({})
        for self.rows[-1] in states:
            self.write()

    def write(self) -> str:
        """Returns the Markdown."""
        lines = [*(f"{key}: {value}" for key, value in self.notes.items()), "", *table(self.rows)]
        text = "\n".join(lines) + "\n"
        (self.out / f"{self.name}.md").write_text(text)
        (self.out / f"{self.name}.json").write_text(json.dumps({**self.notes, "rows": self.rows}, indent=2) + "\n")
        return text
