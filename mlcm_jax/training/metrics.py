"""Metrics on their way to a person: metrics.jsonl, TensorBoard event files and the progress bar."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import tensorboardX
from etils import epath
from tqdm import tqdm

from mlcm_jax.hub.save import to_json
from mlcm_jax.outputs import atomic_write, is_remote
from mlcm_jax.parallel.distributed import is_first
from mlcm_jax.training.wandb_run import WandbRun

UPLOAD_SECONDS = 60


class Lines:
    """A text file that grows by whole lines; ``text`` replaces what it held.

    An object at gs:// cannot grow: it is written anew, at most every ``UPLOAD_SECONDS``.
    """

    def __init__(self, path: epath.Path, text: str):
        self._path, self._text, self._uploaded, self._file = path, text, 0.0, None
        with atomic_write(path) as f:
            f.write(text.encode())
        if not is_remote(path):
            self._file = Path(path).open("a", buffering=1)  # noqa: SIM115  (close() does)

    def write(self, line: str) -> None:
        if self._file is not None:
            self._file.write(line)
            return
        self._text += line
        if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self._upload()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        else:
            self._upload()

    def _upload(self) -> None:
        self._path.write_text(self._text)
        self._uploaded = time.monotonic()


class MetricWriter:
    """Appends to ``workdir``/metrics.jsonl (one JSON object a line, with "step") and to event files in workdir/tb.

    start_step: lines of later steps, left by a killed run that this one repeats, are dropped. Of several processes
    only the first writes. wandb: a run there that gets the same.
    """

    def __init__(self, workdir: epath.Path, *, start_step: int, wandb: WandbRun | None = None):
        self._file, self._board, self._wandb = None, None, wandb
        if not is_first():
            return
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / "metrics.jsonl"
        kept = [m for m in read_metrics(self._path) if m["step"] <= start_step]
        self._file = Lines(self._path, "".join(to_json(m) + "\n" for m in kept))
        self._board = tensorboardX.SummaryWriter(str(workdir / "tb"), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._file is None or self._board is None:
            return
        self._file.write(to_json({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.write(step, values)

    def image(self, step: int, name: str, image) -> None:
        """An image, uint8 [H, W, 3]."""
        if self._board is not None:
            self._board.add_image(name, image, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.image(step, name, image)

    def close(self) -> None:
        for each in (self._file, self._board, self._wandb):
            if each is not None:
                each.close()


def read_metrics(path: epath.Path) -> list[dict]:
    """The whole lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def progress_bar(num_steps: int, start_step: int) -> tqdm:
    """A bar over the steps with ETA; the loop adds loss and examples/s."""
    look = {"unit": "step", "dynamic_ncols": True, "mininterval": 1.0, "smoothing": 0.05, "disable": not is_first()}
    return tqdm(total=num_steps, initial=start_step, **look)
