"""The whole speed table of a GPU in one command: python benchmarks/gpu.py --out=DIR (at most 8 minutes).

A row is a kind of work and a batch size: lora:2 and full:2 are training steps, sample:8 is sampling with decoding at
all --steps, start:2 is a second start up to its first finished LoRA step. @NAME after it sets one of VARIANTS.
Each row has a process of its own: all get ready at the same time, which is mostly compiling, and then measure one
after the other, torch and diffusers beside ours in turns. A figure is written as soon as it is there.
--compile_only fills the compilation cache and measures nothing, beside other work on the GPU if need be.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

import profiling
import sample  # its flags, too
import timing
from absl import app, flags

HERE = Path(__file__).parent

# name: what it is started with
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "unroll": {"unroll": 2},
    "graphs": {
        "xla": "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE"
    },
    "no_graphs": {"xla": "--xla_gpu_enable_command_buffer="},
    "slices": {"xla": "--xla_gpu_enable_dynamic_slice_fusion=true"},
    "cublas": {"xla": "--xla_gpu_enable_triton_gemm=false"},
}
MEASURING = 0.35  # share of --time_limit that is kept for measuring what is ready by then
DEFAULT_ROWS = ("sample:8", "sample:1", "lora:2", "lora:4", "full:2", "start:2")

ROWS = flags.DEFINE_list("rows", list(DEFAULT_ROWS), "What is measured, in this order.")
COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Fill the compilation cache; measure nothing.")
TORCH_COMPILE = flags.DEFINE_bool("torch_compile", False, "torch.compile as well; of the LoRA step over 6 minutes.")
TORCH_ROWS = flags.DEFINE_list("torch_rows", None, "Rows that torch is measured in; default: all.")
flags.FLAGS.set_default("model", "sdxl")
flags.FLAGS.set_default("dtype", "bfloat16")
flags.FLAGS.set_default("repeats", 6)
flags.FLAGS.set_default("time_limit", 480.0)
flags.FLAGS.set_default("out", "runs/gpu")
flags.FLAGS.set_default("steps", ["4", "1", "2", "8"])  # the first is profiled


class Worker:
    """A row's process; what it says can be waited for until a deadline of time.monotonic()."""

    def __init__(self, name: str, log: TextIO):
        self.name, self._log, self._last_line = name, log, ""
        row, _, variant = name.partition("@")
        settings = VARIANTS[variant]
        command = [sys.executable, str(HERE / "gpu_worker.py"), f"--row={row}", f"--started={time.monotonic()}"]
        command += [f"--unroll={settings.get('unroll', 1)}"]
        for flag in ("model", "dtype", "repeats"):
            command.append(f"--{flag}={flags.FLAGS[flag].value}")
        command.append("--steps=" + ",".join(sample.STEPS.value))
        env = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {settings.get('xla', '')}".strip()}
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(command, env=env, text=True, **pipes)
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._errors = threading.Thread(target=self._read_errors, daemon=True)
        for thread in (self._errors, threading.Thread(target=self._read_messages, daemon=True)):
            thread.start()

    def _read_messages(self) -> None:
        for line in self.process.stdout or ():
            if line.startswith("{"):
                self._messages.put(json.loads(line))
        self._messages.put(None)

    def _read_errors(self) -> None:
        for line in self.process.stderr or ():
            self._last_line = line.strip()[:200] or self._last_line
            self._log.write(f"{self.name}: {line}")
            self._log.flush()

    def next_message(self, deadline: float) -> dict[str, Any] | None:
        """None when the process has ended. Raises TimeoutError at the deadline."""
        try:
            return self._messages.get(timeout=max(deadline - time.monotonic(), 0.0))
        except queue.Empty:
            raise TimeoutError(f"{self.name}: out of time") from None

    def last_words(self) -> str:
        """The last line that a process which has ended wrote to stderr."""
        self._errors.join(timeout=60)
        return self._last_line

    def turn(self, order: dict[str, Any] | None) -> None:
        """Let it measure, or, without an order, end."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Report:
    """gpu.md and gpu.json, written anew with every figure."""

    def __init__(self, out: Path):
        self.out, self.notes, self.rows = out, timing.command_notes("gpu.py"), {}
        self.programs, self.profiles, self.starts, self.problems = {}, {}, {}, {}

    def take(self, name: str, message: dict[str, Any]) -> None:
        """A message of a worker."""
        self.notes |= message.get("notes", {})
        if "row" in message:
            row = message["row"]
            variant = name.partition("@")[2]
            row["work"] += f", {variant}" * bool(variant)
            self.rows[row["work"]] = row
        for key, table in (("program", self.programs), ("profile", self.profiles), ("start", self.starts)):
            if key in message:
                table[name] = message[key]
        self.write()

    def fail(self, name: str, reason: str) -> None:
        self.problems[name] = reason
        self.write()

    def write(self) -> str:
        """Returns the Markdown."""
        lines = [f"{key}: {value}" for key, value in self.notes.items()]
        lines += ["", *timing.table(list(self.rows.values()))] if self.rows else []
        lines += ["", *program_table(self.programs)] if self.programs else []
        lines += ["", *profiling.table(self.profiles)] if self.profiles else []
        lines += [""] + [f"{name}: first step after {s['seconds']:.0f} s" for name, s in self.starts.items()]
        lines += [f"{name}: {reason}" for name, reason in self.problems.items()]
        text = "\n".join(lines) + "\n"
        (self.out / "gpu.md").write_text(text)
        names = ("notes", "rows", "programs", "profiles", "starts", "problems")
        (self.out / "gpu.json").write_text(json.dumps({n: getattr(self, n) for n in names}, indent=2) + "\n")
        return text


def program_table(programs: dict[str, dict[str, Any]]):
    """What it took to get ready: a Markdown table in seconds and gigabytes."""
    yield "| program | trace, s | compile, s | ready after, s | not in the cache | arguments | temporaries |"
    yield "|---|---|---|---|---|---|---|"
    for name, p in programs.items():
        seconds = " | ".join(f"{p[key]:.1f}" for key in ("trace_seconds", "compile_seconds", "ready_seconds"))
        memory = " | ".join(f"{p[key] / 1e9:.1f} GB" if key in p else "-" for key in ("arguments", "temporaries"))
        yield f"| {name} | {seconds} | {p['cache_misses']} | {memory} |"


def get_ready(workers: list[Worker], report: Report, deadline: float) -> list[Worker]:
    """Those that are ready in time; the others end, so that they take nothing from those that measure."""
    ready = []
    for worker in workers:
        try:
            message = worker.next_message(deadline)
        except TimeoutError as error:
            report.fail(worker.name, f"{error} before it was ready")
            worker.end()
            continue
        if message is None:
            report.fail(worker.name, worker.last_words())
        else:
            report.take(worker.name, message)
            ready.append(worker)
    return ready


def measure(worker: Worker, report: Report, deadline: float) -> None:
    """A worker's turn; none after the deadline."""
    if time.monotonic() >= deadline:
        report.fail(worker.name, f"{worker.name}: out of time before its turn")
        return
    with_torch = TORCH_ROWS.value is None or worker.name in TORCH_ROWS.value
    sides = ["torch"] * with_torch + ["torch.compile"] * (with_torch and TORCH_COMPILE.value)
    worker.turn({"deadline": deadline, "torch": sides})
    try:
        while (message := worker.next_message(deadline)) is not None:
            report.take(worker.name, message)
    except TimeoutError as error:
        report.fail(worker.name, str(error))
    else:
        worker.process.wait()
    if worker.process.poll():
        report.fail(worker.name, worker.last_words())


def main(argv):
    del argv
    limit = flags.FLAGS["time_limit"].value
    deadline = time.monotonic() + limit
    out = Path(flags.FLAGS["out"].value)
    out.mkdir(parents=True, exist_ok=True)
    report, workers, log = Report(out), [], (out / "gpu.log").open("w")  # what the processes say beside their figures
    try:
        # A second start is one that nothing else slows down.
        together = [name for name in ROWS.value if not name.startswith("start")]
        alone = [] if COMPILE_ONLY.value else [name for name in ROWS.value if name.startswith("start")]
        workers += [Worker(name, log) for name in together]
        ready = get_ready(workers, report, deadline if COMPILE_ONLY.value else deadline - MEASURING * limit)
        for worker in ready:
            if not COMPILE_ONLY.value:
                measure(worker, report, deadline)
            worker.end()
        for name in alone:
            workers.append(Worker(name, log))
            for worker in get_ready(workers[-1:], report, deadline):
                measure(worker, report, deadline)
    finally:
        for worker in workers:
            worker.end()
    print(report.write())


if __name__ == "__main__":
    app.run(main)
