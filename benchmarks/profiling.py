"""Kernel times of a run by class, from jax's profiler, and what the device spent idle."""

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

# The first expression that is found in a kernel's name says its class. "conv" is not "convert".
CLASSES = (
    ("attention", r"sdpa|fmha|flash|softmax"),
    ("convolutions", r"conv(?!ert)|[fdw](prop|grad)|implicit_gemm|nchw|nhwc"),
    ("products", r"gemm|dot|nvjet|cublas|cutlass|xmma|splitk|matmul"),
    ("copies", r"memcpy|memset|copy|slice|transpose|concatenate|^pad|_pad|gather|scatter"),
)
REST = "normalisation, elementwise"
IDLE = "idle"
LONG_GAP = 100e-6  # seconds: longer than launching a kernel takes
LARGEST = 12  # kernels that are named


class Kernel(NamedTuple):
    """A kernel's run, in seconds."""

    name: str
    start: float
    end: float


def class_of(name: str) -> str:
    """The class of a kernel by its name."""
    return next((label for label, pattern in CLASSES if re.search(pattern, name.lower())), REST)


def kernel_times(run: Callable[[], Any], repeats: int = 3, count: int = 1) -> dict[str, Any] | None:
    """Profile ``repeats`` runs, each of which does the work ``count`` times: seconds of the work in each class and of
    idling; None where the device tells no kernels."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                run()
        kernels = [k for file in Path(folder).rglob("*.xplane.pb") for k in read_kernels(file)]
    return summarise(kernels, repeats * count) if kernels else None


def read_kernels(file: Path) -> Iterable[Kernel]:
    """The kernels of the first GPU in a profile."""
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if plane.name == "/device:GPU:0":
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        yield Kernel(event.name, 1e-9 * event.start_ns, 1e-9 * (event.start_ns + event.duration_ns))


def summarise(kernels: list[Kernel], repeats: int) -> dict[str, Any]:
    """Seconds a run: by class, idle in gaps of either kind, and of the kernels that take longest by name.

    Kernels that overlap count in full in their classes, so that the classes may exceed the span.
    """
    kernels = sorted(kernels, key=lambda kernel: kernel.start)
    classes, names = {label: 0.0 for label, _ in CLASSES} | {REST: 0.0}, {}
    idle, long_gaps, end = 0.0, 0.0, kernels[0].start
    for kernel in kernels:
        seconds = (kernel.end - kernel.start) / repeats
        classes[class_of(kernel.name)] += seconds
        stem = re.sub(r"[._]\d+$", "", kernel.name)
        count, total = names.get(stem, (0, 0.0))
        names[stem] = count + 1, total + seconds
        gap = max(kernel.start - end, 0.0) / repeats
        idle += gap
        long_gaps += gap if gap * repeats > LONG_GAP else 0.0
        end = max(end, kernel.end)
    largest = sorted(names.items(), key=lambda item: -item[1][1])[:LARGEST]
    return {
        "seconds": classes | {IDLE: idle},
        "idle_in_long_gaps": long_gaps,
        "span": (end - kernels[0].start) / repeats,
        "kernels": len(kernels) / repeats,
        "largest": [{"name": name, "count": n / repeats, "seconds": total} for name, (n, total) in largest],
    }


def table(profiles: dict[str, dict[str, Any]]) -> Iterable[str]:
    """Lines of a Markdown table: milliseconds of each class, a row a profile."""
    columns = [*(label for label, _ in CLASSES), REST, IDLE]
    yield "| ms a run | " + " | ".join(columns) + " | idle in gaps above 0.1 ms | kernels |"
    yield "|---|" + "---|" * (len(columns) + 2)
    for name, profile in profiles.items():
        values = [profile["seconds"][column] for column in columns] + [profile["idle_in_long_gaps"]]
        yield f"| {name} | " + " | ".join(f"{1e3 * v:.3g}" for v in values) + f" | {profile['kernels']:.0f} |"
