"""launch/*.py in processes of their own, on a tiny teacher, for tests of what runs do."""

import signal
import socket
import time
from pathlib import Path

import numpy as np
from forked_programs import Started
from PIL import Image

from mlcm_jax.training.metrics import read_metrics

PROMPT = "red heart"
TIMEOUT = 1500  # seconds; of a machine that is busy with other tests
HEARTBEAT_TIMEOUT = 10  # seconds, which a test of a killed process waits for


class Programs:
    """Programs on CPU devices, which share the session's cache of compiled programs."""

    def __init__(self, folder: Path, teacher: Path):
        self.folder, self.teacher = folder, teacher
        (folder / "prompts.txt").write_text("red heart\nblue star\ngreen leaf\nyellow sun\nblack cat\n")
        (folder / "grid.txt").write_text(PROMPT + "\n")

    def start(self, program: str, *args: str, devices: int = 1) -> Started:
        return Started(f"launch/{program}.py", args, {}, self.folder, devices)

    def run(self, program: str, *args: str, devices: int = 1) -> tuple[str, str]:
        process = self.start(program, *args, devices=devices)
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
        assert process.returncode == 0, err[-3000:]
        return out, err

    def start_together(self, program: str, *args: str, processes: int, devices: int) -> list[Started]:
        """Several processes of one run, with ``devices`` each."""
        joined = (f"--coordinator_address={free_address()}", f"--num_processes={processes}")
        joined += (f"--heartbeat_timeout={HEARTBEAT_TIMEOUT}",)
        return [self.start(program, *args, *joined, f"--process_id={i}", devices=devices) for i in range(processes)]

    def train_args(self, workdir: Path, **settings) -> list[str]:
        values = {
            "teacher": self.teacher,
            "prompts": self.folder / "prompts.txt",
            "num_steps": 12,
            "batch_size": 2,
            "num_segments": 4,
            "log_every": 1,
            "checkpoint_every": 5,
            "sample.prompts": self.folder / "grid.txt",
            "sample.steps": "1,4",
            "sample.teacher_steps": 4,
            "sample.teacher_few_steps": 1,
        } | settings
        overrides = [f"--config.{name}={value}" for name, value in values.items()]
        return ["--config=configs/emoji.py", f"--workdir={workdir}", *overrides]

    def sample(self, model: Path, latents: Path, num_steps: int, *args: str) -> np.ndarray:
        out = self.folder / f"{model.name}_{num_steps}.png"
        self.run(
            "sample", f"--model={model}", f"--prompt={PROMPT}", f"--latents={latents}", f"--steps={num_steps}",
            f"--out={out}", *args,
        )  # fmt: skip
        return np.asarray(Image.open(out))


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def signal_after(process: Started, metrics: Path, step: int, number: signal.Signals, to: Started | None = None) -> None:
    """Send a signal as soon as the run has written the metrics of ``step`` and a checkpoint; to: its peer instead."""
    deadline = time.monotonic() + TIMEOUT
    # On a busy machine steps overtake the checkpoint that is written beside them.
    while not (any(m["step"] >= step for m in read_metrics(metrics)) and saved_steps(metrics.parent)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.005)
    (to or process).send_signal(number)


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def losses(workdir: Path) -> list[tuple[int, float, float]]:
    return [(m["step"], m["loss"], m["grad_norm"]) for m in read_metrics(workdir / "metrics.jsonl")]
