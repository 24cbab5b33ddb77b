"""What a run tells of itself: rates without what is no step's, slow steps, norms, and where else it goes."""

import itertools
import time
from contextlib import closing
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from mlcm_jax.config import base
from mlcm_jax.errors import UserError
from mlcm_jax.training import clock, report
from mlcm_jax.training.flops import peak_flops
from mlcm_jax.training.metrics import MetricWriter, progress_bar, read_metrics
from mlcm_jax.training.profiling import parse_steps
from mlcm_jax.training.report import Known
from mlcm_jax.training.wandb_run import WandbRun, check_wandb


class FakeTime:
    """Seconds that pass when told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)


class Slow:
    """Results of steps that take a second on a device, which begins with one when the one before is finished."""

    def __init__(self, fake: FakeTime, monkeypatch):
        self.fake, self.free = fake, 0.0
        monkeypatch.setattr(clock.jax, "block_until_ready", self.wait)

    def queue(self, seconds=1.0):
        self.free = max(self.free, self.fake.now) + seconds
        return self.free

    def wait(self, until):
        self.fake.now = max(self.fake.now, until)


def test_a_rate_holds_the_steps_alone(monkeypatch):
    fake = FakeTime(monkeypatch)
    device, timer = Slow(fake, monkeypatch), clock.StepClock()
    timer.queued(device.queue(60.0), flops=8.0)  # the first step, which sets things up
    assert timer.rate() is None
    for _ in range(3):
        with timer.waiting():
            fake.now += 0.25
        timer.queued(device.queue(), flops=8.0)
    with timer.aside():  # an image
        fake.now += 1000
    timer.queued(device.queue(), flops=4.0)
    rate = timer.rate()
    assert rate is not None
    # The first of them could not begin before its batch was there; the others' batches came while a step ran.
    np.testing.assert_allclose(rate, ((1.25 + 1 + 1 + 1) / 4, (3 * 8 + 4) / 4, 0.25 * 4 / 4))
    assert timer.rate() is None


def test_a_step_of_ten_times_the_median_is_reported(monkeypatch):
    fake = FakeTime(monkeypatch)
    device, timer = Slow(fake, monkeypatch), clock.StepClock()
    words = [timer.queued(device.queue(seconds), flops=1.0) for seconds in (99, 1, 1, 1, 1, 1, 9, 11, 1)]
    assert words[:-1] == [None] * 8 and words[-1] == "11 s, 11 times the median"


def settings(**values):
    config = base()
    config.update({"batch_size": 4, "log_every": 2, **values})
    return config


def reported(config, workdir, losses, wandb=None):
    """The lines of metrics.jsonl after a step for each loss."""
    known = Known(learning_rate=lambda step: 0.5 / step, flops=lambda step: 3e12)
    with closing(MetricWriter(workdir, start_step=0, wandb=wandb)) as writer:
        told = report.Report(config, writer, progress_bar(len(losses), 0), known, checkpoints=workdir / "checkpoints")
        for step, loss in enumerate(losses, 1):
            told.begins(step)
            told.step(step, {"loss": jnp.float32(loss)}, show=step == 1, last=step == len(losses))
    return read_metrics(workdir / "metrics.jsonl")


def test_lines_hold_the_speed_where_steps_were_counted(tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(ticks)))
    device = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", memory_stats=lambda: {"peak_bytes_in_use": 5 * 10**9})
    monkeypatch.setattr(report.jax, "local_devices", lambda: [device])
    lines = reported(settings(), tmp_path, [3.0, 2.0, 1.0, 0.5])
    assert [line["loss"] for line in lines] == [2.0, 0.5] and [line["learning_rate"] for line in lines] == [0.25, 0.125]
    for line in lines:
        assert line["examples_per_second"] == 4.0 and line["tflops_per_second"] == 3.0 and line["peak_memory_gb"] == 5.0
        np.testing.assert_allclose(line["share_of_peak"], 3 / 989)


def test_on_a_cpu_nothing_is_made_up(tmp_path):
    (line,) = reported(settings(), tmp_path, [3.0, 2.0])
    assert line["tflops_per_second"] > 0 and not {"share_of_peak", "peak_memory_gb"} & set(line)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    with pytest.raises(UserError, match=r"The loss is nan at step 2: .*checkpoints, lower .*learning_rate"):
        reported(settings(), tmp_path, [1.0, float("nan")])


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_goes_by_its_kind(kind, tflops):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == (tflops and tflops * 1e12)


@pytest.mark.parametrize("value", ["10", "13:10", "0:2", "5:5", "a:b"])
def test_a_wrong_range_of_steps_is_answered(value):
    assert parse_steps("10:13") == (10, 13)
    with pytest.raises(UserError, match=f"--profile_steps={value} is no range"):
        parse_steps(value)


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    """The package itself, without its server: what it keeps on disk for a later `wandb sync`."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = settings(wandb_project="emoji")
    wandb_run = WandbRun(config, tmp_path)
    wandb_run.image(1, "samples", np.zeros((4, 4, 3), np.uint8))
    reported(config, tmp_path, [1.0, 0.5], wandb_run)
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert (tmp_path / "wandb_id").read_text() in written.name
    names, deadline = (b"loss", b"learning_rate", b"samples", b"num_segments"), time.monotonic() + 60
    # A process of the package's own writes the file, on a busy machine some time after the run has ended.
    while (missing := [name for name in names if name not in written.read_bytes()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not missing


def test_weights_and_biases_without_the_package(monkeypatch):
    check_wandb(settings())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        check_wandb(settings(wandb_project="emoji"))
