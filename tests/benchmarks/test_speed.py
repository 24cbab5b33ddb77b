"""The speed benchmarks' two sides do the same work: equal losses, equal images, equal numbers of UNet evaluations."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # the programs' own modules are beside them
import sample
import timing
import torch_reference
import train_step
import workload


@pytest.mark.slow  # compiles two training steps: over a minute each
@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_losses_and_evaluations_of_the_training_step_are_torchs(trainable, tmp_path):
    folder = workload.architecture_folder("small", tmp_path)
    program = workload.make_program(workload.step_settings(folder, trainable, 2, "float32", rank=4))
    evaluations = train_step.our_evaluations(program)
    assert evaluations == 8  # teacher 2 x 2, target 2, student 2
    assert train_step.largest_difference(program, program.stages[0].step) <= train_step.TOLERANCE
    reference = train_step.reference_side(program, evaluations, compiled=False)  # raises where the evaluations differ
    assert isinstance(reference.run(), torch_reference.torch.Tensor)


@pytest.mark.slow  # compiles a sampler and a decoder: half a minute
def test_images_are_torchs(tmp_path):
    assert sample.check("small", "float32", tmp_path) <= 1


def test_a_turn_of_several_steps_is_divided_by_their_number():
    timings = [
        timing.time_in_turns({"a": timing.Side(lambda: time.sleep(0.03), lambda: None, count)}, 3)["a"].median
        for count in (1, 3)
    ]
    assert timings[0] >= 0.03 > 0.02 > timings[1] >= 0.01


def test_turns_and_failures_are_reported():
    turns = []
    sides = {name: timing.Side(lambda name=name: turns.append(name), lambda: None) for name in ("a", "b")}
    timings = timing.time_in_turns(sides, 3)
    assert turns == ["a", "b"] * (3 + timing.WARM_UP)
    assert all(len(t.seconds) == 3 for t in timings.values())

    assert timing.torch_side(lambda: turns.append("torch"), "cpu", count=3).run() is None
    assert turns[-3:] == ["torch"] * 3

    def fails():
        raise RuntimeError("no compiler\nmore")

    theirs = {"torch": lambda: sides["b"], "torch.compile": fails}
    states = list(timing.compare(sides["a"], theirs, 2, float("inf")))
    assert [list(state) for state in states] == [["ours"], ["ours", "torch"], ["ours", "torch", "torch.compile"]]
    figures = states[-1]
    assert figures["torch.compile"] == {"error": "RuntimeError: no compiler"}
    assert figures["torch"]["ratio"] > 0
    *_, late = timing.compare(sides["a"], {"torch": fails}, 2, 0.0)
    assert "out of time" in late["torch"]["error"]
    lines = list(timing.table([{"work": "w", "images": 1, "flops": 1.0, **figures}]))
    assert "no compiler" in lines[2] and lines[0].count("|") == lines[2].count("|")
