"""Metrics on their way to a person: metrics.jsonl, TensorBoard event files and the progress bar."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tqdm import tqdm

from mlcm_jax.errors import UserError
from mlcm_jax.hub.save import to_json
from mlcm_jax.outputs import atomic_write, is_remote
from mlcm_jax.parallel.distributed import is_first, say
from mlcm_jax.training.wandb_run import WandbRun

UPLOAD_SECONDS, FLUSH_SECONDS = 60, 120
_EVENTS: Any = event_pb2  # its classes are made when it is imported


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
            with _disk_errors(self._path):
                self._file.write(line)
            return
        self._text += line
        if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self._upload()

    def close(self) -> None:
        if self._file is not None:
            with _disk_errors(self._path):
                self._file.close()
        else:
            self._upload()

    def _upload(self) -> None:
        self._path.write_text(self._text)
        self._uploaded = time.monotonic()


class EventFile:
    """TensorBoard's event file in a folder, here or at gs://, written in the thread that calls.

    tensorboardX's SummaryWriter writes in one of its own; where a disk is full that ends unseen, and the next calls
    wait for it for ever. first_step: what was written of it and later ones is taken back.
    """

    def __init__(self, folder: epath.Path, first_step: int):
        self._folder, self._flushed = folder, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        with _disk_errors(folder):
            self._writer = EventsWriter(str(folder / "events"))
        self._write(session_log=_EVENTS.SessionLog(status=_EVENTS.SessionLog.START), step=first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._write(summary=summary.scalar(name, value), step=step)

    def image(self, step: int, name: str, image) -> None:
        self._write(summary=summary.image(name, image, dataformats="HWC"), step=step)

    def close(self) -> None:
        with _disk_errors(self._folder):
            self._writer.close()

    def _write(self, **fields) -> None:
        with _disk_errors(self._folder):
            self._writer.write_event(_EVENTS.Event(wall_time=time.time(), **fields))
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()


@contextlib.contextmanager
def _disk_errors(place: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{place} cannot be written ({error.strerror or error}): make room there and run the same command to go on "
            "from the last checkpoint."
        ) from error


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
        found, damaged = _read_metrics(self._path)
        if damaged:
            say(f"{'skipped':>10}  damaged lines of {self._path}: {', '.join(map(str, damaged[:20]))}")
        kept = [m for m in found if m["step"] <= start_step]
        self._file = Lines(self._path, "".join(to_json(m) + "\n" for m in kept))
        self._board = EventFile(workdir / "tb", start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._file is None or self._board is None:
            return
        self._file.write(to_json({"step": step, **values}) + "\n")
        self._board.scalars(step, values)
        if self._wandb is not None:
            self._wandb.write(step, values)

    def image(self, step: int, name: str, image) -> None:
        """An image, uint8 [H, W, 3]."""
        if self._board is not None:
            self._board.image(step, name, image)
        if self._wandb is not None:
            self._wandb.image(step, name, image)

    def close(self) -> None:
        for each in (self._file, self._board, self._wandb):
            if each is not None:
                each.close()


def read_metrics(path: epath.Path) -> list[dict]:
    """The whole lines of a metrics.jsonl; a last line that a kill cut short, and damaged ones, are left out."""
    return _read_metrics(path)[0]


def _read_metrics(path: epath.Path) -> tuple[list[dict], list[int]]:
    """Metrics, and the numbers of the lines that hold none."""
    if not path.exists():
        return [], []
    metrics, damaged = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            values = json.loads(line)
            metrics.append({**values, "step": int(values["step"])})
        except (ValueError, TypeError, KeyError):
            damaged.append(number)
    return metrics, damaged


def progress_bar(num_steps: int, start_step: int) -> tqdm:
    """A bar over the steps with ETA; the loop adds loss and examples/s."""
    look = {"unit": "step", "dynamic_ncols": True, "mininterval": 1.0, "smoothing": 0.05, "disable": not is_first()}
    return tqdm(total=num_steps, initial=start_step, **look)
