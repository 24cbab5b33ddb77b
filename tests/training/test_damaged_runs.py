"""Runs whose files have suffered: the newest whole checkpoint is taken, and what is skipped is said."""

import json
import resource
import shutil

import jax
import numpy as np
import optax
import pytest
from etils import epath

from mlcm_jax.data.prompts import TextLines, fingerprint
from mlcm_jax.distillation import state as train_state
from mlcm_jax.errors import UserError
from mlcm_jax.training.checkpoint import Checkpoints, latest_step, read_trained
from mlcm_jax.training.checkpoint_files import MANIFEST, find_damage, newest_whole
from mlcm_jax.training.metrics import MetricWriter, read_metrics
from mlcm_jax.training.resume import PROMPTS_FILE, changed_prompts

STEPS = (3, 5)


def state_of(step: int, n: int = 3000):
    params = {"a": {"kernel": np.full((n, 4), step, np.float32)}, "b": np.arange(n, dtype=np.float32)}
    return train_state.create(params, optax.adam(1e-3), with_ema=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder of two checkpoints."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder)
    for step in STEPS:
        checkpoints.save(state_of(step), step)
    checkpoints.close()
    return folder


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def largest(folder):
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def rewrite(file, change):
    data = bytearray(file.read_bytes())
    file.write_bytes(change(data))


def flipped(data):
    data[len(data) // 2] ^= 1
    return data


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def without_manifest(folder):
    (folder / MANIFEST).unlink()
    (folder / "default" / "manifest.ocdbt").unlink()


DAMAGES = {
    "emptied": (emptied, "default/_METADATA is missing or empty"),
    "a file is gone": (lambda folder: largest(folder).unlink(), "is missing"),
    "a file is cut": (lambda folder: rewrite(largest(folder), lambda data: data[:-100]), "of {size} bytes"),
    "a bit has changed": (lambda folder: rewrite(largest(folder), flipped), "is not what was written"),
    "its manifest is cut": (lambda folder: rewrite(folder / MANIFEST, lambda data: data[:50]), "cannot be read"),
    "from an older version": (without_manifest, "default/manifest.ocdbt is missing or empty"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_newest_whole_checkpoint_is_taken(run, capsys, kind):
    damage, words = DAMAGES[kind]
    size = largest(run / "5").stat().st_size
    damage(run / "5")
    assert latest_step(run) == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("   skipped  the checkpoint of step 5, which is damaged: ") and len(line) < 300
    assert words.format(size=size) in line
    newest = read_trained(run, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert newest is not None
    steps, trained = newest
    assert steps == 3 and (np.asarray(trained["a"]["kernel"]) == 3).all()


def test_any_change_of_any_file_is_found(run):
    state = [file for file in (run / "5" / "default").rglob("*") if file.is_file()]
    files = [run / "5" / MANIFEST, *state]
    assert len(files) > 8
    for file in files:
        data = file.read_bytes()
        for change in (lambda d: d[: len(d) // 2], flipped):
            file.write_bytes(change(bytearray(data)))
            assert find_damage(epath.Path(run / "5")), file
        file.unlink()
        assert file.name == MANIFEST or find_damage(epath.Path(run / "5")), file
        file.write_bytes(data)
    for file in (run / "5").iterdir():
        if file.is_file() and file.name != MANIFEST:
            file.unlink()  # what else is there is not needed
    assert newest_whole(run) == (5, {})
    checkpoints = Checkpoints(run)
    assert (checkpoints.restore(jax.eval_shape(lambda: state_of(0))).params["a"]["kernel"] == 5).all()
    checkpoints.close()


def test_a_damaged_step_is_set_aside_and_saved_again(run):
    like = jax.eval_shape(lambda: state_of(0))
    for _ in range(2):  # what was set aside before gives way
        rewrite(largest(run / "5"), flipped)
        assert latest_step(run, set_aside=True) == 3
        assert (run / "5.damaged").is_dir() and not (run / "5").exists()
        checkpoints = Checkpoints(run)
        assert (checkpoints.restore(like).params["a"]["kernel"] == 3).all()
        checkpoints.save(state_of(5), 5)
        checkpoints.close()
        assert newest_whole(run) == (5, {})


def test_where_none_is_whole_a_run_begins_anew(run, capsys):
    for step in STEPS:
        emptied(run / str(step))
    assert latest_step(run, set_aside=True) is None
    assert [line.split(",")[0].split()[-1] for line in capsys.readouterr().out.splitlines()] == ["5", "3"]
    checkpoints = Checkpoints(run)
    assert checkpoints.restore(jax.eval_shape(lambda: state_of(0))) is None
    checkpoints.close()


def test_a_full_disk_leaves_the_checkpoint_before_whole(tmp_path):
    """Files that may not grow are what a full disk is to orbax, without a disk to fill."""
    random = np.random.default_rng(0).standard_normal((300, 300), np.float32)  # does not compress
    small = train_state.create({"a": np.zeros(3, np.float32)}, optax.sgd(1.0))
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(small, 1)
    checkpoints.save(small, 2)
    with pytest.raises(UserError) as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            checkpoints._manager.wait_until_finished()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            checkpoints.save(train_state.create({"a": random}, optax.sgd(1.0)), 4)
            checkpoints.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value).startswith("The checkpoint of step 4 cannot be written (")
    assert str(error.value).endswith("run the same command to go on after step 2.") and len(str(error.value)) < 300
    assert newest_whole(tmp_path / "c") == (2, {})
    again = Checkpoints(tmp_path / "c", keep=1)
    assert again.restore(jax.eval_shape(lambda: small)).params["a"].shape == (3,)
    again.save(small, 4)
    again.close()
    assert newest_whole(tmp_path / "c") == (4, {})


def test_damaged_lines_of_metrics_are_left_out(tmp_path, capsys):
    workdir = epath.Path(tmp_path)
    writer = MetricWriter(workdir, start_step=0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1 / step})
    writer.close()
    first, second, third = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    damaged = first + second[:9] + b"\n\xff\xfe\n\n[1]\n{}\n" + b'{"step": null}\n' + third + second[:20]
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    assert [m["step"] for m in read_metrics(workdir / "metrics.jsonl")] == [1, 3]
    capsys.readouterr()
    MetricWriter(workdir, start_step=2).close()
    assert capsys.readouterr().out == f"   skipped  damaged lines of {tmp_path / 'metrics.jsonl'}: 2, 3, 4, 5, 6, 7\n"
    assert (tmp_path / "metrics.jsonl").read_bytes() == first, "step 3 is to be repeated"


def test_a_full_disk_is_said_by_the_metrics(tmp_path):
    writer = MetricWriter(epath.Path(tmp_path), start_step=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(UserError, match=r"(metrics\.jsonl|tb) cannot be written \(File too large\): make room"):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
            for step in range(1000):
                writer.write(step, {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_prompts_that_have_changed_are_reported(tmp_path):
    workdir, before = epath.Path(tmp_path), TextLines(["a", "b", "c"])
    assert changed_prompts(before, workdir, 0) == changed_prompts(before, workdir, 5) == ""
    told = changed_prompts(TextLines(["a", "c", "b"]), workdir, 5)
    assert told.startswith("has changed since the run began (3 prompts then, 3 now)")
    assert "3 prompts then, 4 now" in changed_prompts(TextLines([*"abcd"]), workdir, 5)
    assert json.loads((tmp_path / PROMPTS_FILE).read_text()) == fingerprint(before), "what the run began with stays"
    assert changed_prompts(TextLines(["d"]), workdir, 0) == "", "a run that begins anew has its own"
    (tmp_path / PROMPTS_FILE).unlink()
    assert changed_prompts(before, workdir, 5) == "", "a run that is older than the note"
    assert fingerprint(before) == json.loads((tmp_path / PROMPTS_FILE).read_text())


def test_every_prompt_counts_in_the_fingerprint():
    lines = [str(i) for i in range(10_000)]
    whole = fingerprint(TextLines(lines))
    for i in (0, 4095, 4096, 9_999):
        assert fingerprint(TextLines([*lines[:i], "x", *lines[i + 1 :]])) != whole
    assert fingerprint(TextLines(["a", "b"])) != fingerprint(TextLines(["a b"]))
