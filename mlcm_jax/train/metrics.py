"""Metrics on their way to a person: metrics.jsonl, TensorBoard event files and the progress bar."""

import json
from collections.abc import Mapping
from pathlib import Path

import tensorboardX
from tqdm import tqdm


class MetricWriter:
    """Appends to ``workdir``/metrics.jsonl (one JSON object a line, with "step") and to event files in workdir/tb.

    start_step: lines of later steps, left by a killed run that this one repeats, are dropped.
    """

    def __init__(self, workdir: Path, *, start_step: int):
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / "metrics.jsonl"
        kept = [m for m in read_metrics(self._path) if m["step"] <= start_step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(m) + "\n" for m in kept))
        temporary.replace(self._path)
        self._file = self._path.open("a", buffering=1)
        self._board = tensorboardX.SummaryWriter(str(workdir / "tb"), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def image(self, step: int, name: str, image) -> None:
        """An image, uint8 [H, W, 3], for TensorBoard."""
        self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict]:
    """The whole lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def progress_bar(num_steps: int, start_step: int) -> tqdm:
    """A bar over the steps with ETA; the loop adds loss and examples/s."""
    return tqdm(total=num_steps, initial=start_step, unit="step", dynamic_ncols=True, mininterval=1.0, smoothing=0.05)
