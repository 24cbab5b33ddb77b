"""One run in two processes on this machine, which talk by gloo: the numbers of one process, and how they end.

A toy network takes the place of the UNet in the quick tests; the slow ones start the real program.
"""

import re
import signal

import numpy as np
import pytest
from forked_programs import Started
from multihost_worker import FAILS
from programs import HEARTBEAT_TIMEOUT, TIMEOUT, Programs, free_address, losses, saved_steps, signal_after

from mlcm_jax.hub.tensor_reader import read_json
from mlcm_jax.parallel.distributed import EXIT_STATUS

pytestmark = pytest.mark.multihost

WORKER = "tests/multihost_worker.py"
FOREVER = 100_000  # steps: on a quick machine a run must not end by itself before it is told to
LOST = (
    r"^error: {}, so this process ends too: see that one's log, then run the same command in all processes again to go "
    r"on from the last checkpoint\.$"
)

GLOO = r"\[Gloo\]|peer ranks"  # its threads tear each other's lines apart


def toys(workdir, num_steps, fsdp=1, processes=1, devices=4):
    """Processes of one run of the toy network, with ``devices`` in all."""
    args = [workdir, num_steps, fsdp]
    address = free_address()
    numbered = [[address, processes, i] for i in range(processes)] if processes > 1 else [[]]
    folder = workdir.parent
    return [Started(WORKER, [*args, *own], {}, folder, devices // processes) for own in numbered]


def ended(processes):
    """(exit status, stdout, stderr) of each."""
    outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def kill_stop_and_go_on(start, workdir):
    """The second process of a run is killed; both start again, until the second is told to stop. Returns the step.

    start: (number of steps) -> the two processes.
    """
    first, second = start(FOREVER)
    signal_after(first, workdir / "metrics.jsonl", 2, signal.SIGKILL, to=second)
    (status, out, err), _ = ended([first, second])
    assert status == EXIT_STATUS and "Traceback" not in err
    silent = LOST.format(f"Process 1 has been silent for {HEARTBEAT_TIMEOUT} s")
    assert re.search(silent, err, re.MULTILINE), err[-1000:]
    assert re.match(r" processes  2: coordinator localhost:\d+; this is number 0\n", out)
    whole, killed_at = saved_steps(workdir)[-1], losses(workdir)[-1][0]

    first, second = start(FOREVER)
    signal_after(first, workdir / "metrics.jsonl", killed_at + 1, signal.SIGTERM, to=second)
    (status, out, err), (other_status, other_out, other_err) = ended([first, second])
    assert (status, other_status) == (1, 1)
    stopped_at = saved_steps(workdir)[-1]
    for text in (err, other_err):
        assert f"Stopped by a signal at step {stopped_at}: run the same command to go on." in text
        assert "Traceback" not in text
    assert stopped_at == losses(workdir)[-1][0] > whole
    ours = [line for line in other_out.splitlines() if not re.search(GLOO, line)]
    assert len(ours) == 1 and "step/s" not in other_err, "what is printed is printed once"
    return stopped_at


def assert_same_numbers(workdir, expected):
    assert [step for step, *_ in losses(workdir)] == [step for step, *_ in losses(expected)]
    np.testing.assert_allclose(losses(workdir), losses(expected), rtol=1e-4)


def test_a_run_that_is_killed_stopped_and_resumed_elsewhere_has_the_numbers_of_one_process(tmp_path):
    """Two processes with two devices each, data 2 x fsdp 2; then one with one; against one with four replicas."""
    workdir, expected = tmp_path / "pair", tmp_path / "alone"
    stopped_at = kill_stop_and_go_on(lambda steps: toys(workdir, steps, fsdp=2, processes=2), workdir)
    ends = [*toys(workdir, stopped_at + 2, devices=1), *toys(expected, stopped_at + 2)]
    assert [(status, err) for status, _, err in ended(ends) if status] == []
    assert_same_numbers(workdir, expected)
    ours, theirs = (read_json(run / "weights.json") for run in (workdir, expected))
    for name in ("a", "b"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5)


def test_a_mistake_in_one_process_is_reported_to_the_other(tmp_path):
    (status, _, err), (other_status, _, other_err) = ended(toys(tmp_path / "run", FAILS, processes=2))
    assert (other_status, other_err.strip().splitlines()[-1]) == (2, "error: A file is missing here.")
    assert status == EXIT_STATUS
    reason = re.escape("Process 1 ended with UserError (A file is missing here.)")
    assert re.search(LOST.format(reason), err, re.MULTILINE), err[-1000:]


SETTINGS = {
    "optim.schedule": "constant",  # of which the number of steps changes nothing
    "batch_size": 4,
    "checkpoint_every": 2,
    "sample_every": 100,
    "sample.steps": "1",
    "sample.teacher_steps": 1,
}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def programs(smallest_folder, tmp_path_factory):
    return Programs(tmp_path_factory.mktemp("programs"), smallest_folder)


def alone(programs, workdir, num_steps, devices):
    """A run, or the rest of one, in one process."""
    programs.run("train", *programs.train_args(workdir, **SETTINGS, num_steps=num_steps), devices=devices)
    return workdir


def together(programs, workdir, **settings):
    """A run in two processes with two devices each."""
    return programs.start_together(
        "train", *programs.train_args(workdir, **SETTINGS, **settings), processes=2, devices=2
    )


def assert_same_weights(workdir, expected):
    from safetensors.numpy import load_file

    ours, theirs = (load_file(run / "export" / WEIGHTS) for run in (workdir, expected))
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name].astype(np.float32), values.astype(np.float32), atol=2e-3, err_msg=name)


@pytest.mark.slow
def test_the_program_goes_on_as_one_process(programs):
    workdir = programs.folder / "pair"
    mesh = {"mesh.data": 2, "mesh.fsdp": 2}
    stopped_at = kill_stop_and_go_on(lambda n: together(programs, workdir, num_steps=n, **mesh), workdir)
    alone(programs, workdir, stopped_at + 2, devices=1)
    expected = alone(programs, programs.folder / "alone", stopped_at + 2, devices=4)
    assert_same_numbers(workdir, expected)
    assert_same_weights(workdir, expected)


@pytest.mark.slow
def test_replicas_in_two_processes_have_the_numbers_of_one(programs):
    workdir = programs.folder / "replicas"
    assert [status for status, *_ in ended(together(programs, workdir, num_steps=4))] == [0, 0]
    expected = alone(programs, programs.folder / "reference", 4, devices=4)
    assert_same_numbers(workdir, expected)
    assert_same_weights(workdir, expected)
    files = {path.relative_to(expected) for path in expected.rglob("*") if path.is_file() and "tb" not in path.parts}
    ours = {path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file() and "tb" not in path.parts}
    assert {f for f in ours ^ files if f.parts[0] != "checkpoints"} == set()
    assert len(list((workdir / "tb").iterdir())) == 1, "one process writes"
