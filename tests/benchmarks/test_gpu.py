"""benchmarks/gpu.py's rows, turns and deadlines, with a stand-in for the process that measures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

WORKER = """
import json, os, sys, time
row = next(a for a in sys.argv if a.startswith("--row=")).removeprefix("--row=")
def say(**message): print(json.dumps(message), flush=True)
print("not a message", flush=True)
if row == "full:2":
    sys.exit("out of memory")
if row == "full:8":
    time.sleep(600)
figures = {"trace_seconds": 1.0, "compile_seconds": 2.0, "ready_seconds": 3.0, "cache_misses": 0}
say(program=figures | {"flags": os.environ["XLA_FLAGS"], "argv": sys.argv}, notes={"hardware": "a stand-in"})
turn = json.loads(sys.stdin.readline())
if turn is None:
    sys.exit()
with open("turns", "a") as file:
    file.write(f"{row} {turn['torch']}\\n")
if row.startswith("start"):
    say(start={"seconds": 4.0})
    sys.exit()
ours = {"seconds": 0.5, "shown": "500 ms", "memory": 10**9}
say(row={"work": row, "images": 2, "flops": 2e12, "peak_flops": 8e12, "ours": ours})
if row == "lora:4":
    time.sleep(600)
"""

RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
import gpu
from absl import app
gpu.HERE = Path.cwd()
app.run(gpu.main)
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "gpu_worker.py").write_text(WORKER)

    def call(*flags):
        command = [sys.executable, "-c", RUN, str(BENCHMARKS), "--out=out", *flags]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-2000:]
        turns = tmp_path / "turns"
        found = json.loads((tmp_path / "out" / "gpu.json").read_text())
        return result.stdout, found, turns.read_text().splitlines() if turns.exists() else []

    return call


def test_rows_measure_in_turn_and_a_failure_is_reported(run):
    text, found, turns = run("--rows=full:2,lora:2@slices,sample:8,start:2", "--torch_rows=sample:8")
    assert turns == ["lora:2 []", "sample:8 ['torch']", "start:2 []"]
    assert found["problems"] == {"full:2": "out of memory"}
    assert found["starts"] == {"start:2": {"seconds": 4.0}} and "first step after 4 s" in text
    assert list(found["rows"]) == ["lora:2, slices", "sample:8"]
    assert "--xla_gpu_enable_dynamic_slice_fusion=true" in found["programs"]["lora:2@slices"]["flags"]
    assert "dynamic_slice" not in found["programs"]["sample:8"]["flags"]
    assert "--steps=4,1,2,8" in found["programs"]["sample:8"]["argv"]
    assert "4 | 50%" in text and found["notes"]["hardware"] == "a stand-in"


def test_what_is_late_is_left_out_and_what_it_had_stays(run):
    _, found, turns = run("--rows=lora:4,lora:2", "--time_limit=12")
    assert list(found["rows"]) == ["lora:4"] and "out of time" in found["problems"]["lora:4"]
    assert turns[0] == "lora:4 ['torch']"


def test_what_gets_ready_in_time_is_measured_all_the_same(run):
    _, found, turns = run("--rows=full:8,lora:2", "--time_limit=9")
    assert list(found["rows"]) == ["lora:2"] and turns == ["lora:2 ['torch']"]
    assert found["problems"] == {"full:8": "full:8: out of time before it was ready"}


def test_compile_only_measures_nothing(run):
    _, found, turns = run("--rows=lora:2,start:2", "--compile_only", "--model=small")
    assert not turns and not found["rows"] and list(found["programs"]) == ["lora:2"]
    assert "--model=small" in found["programs"]["lora:2"]["argv"]
