"""What a run writes, at gs://: a folder stands in for the bucket, whose objects appear whole and cannot grow."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from etils.epath import backend, gpath
from PIL import Image
from safetensors.numpy import load_file

from mlcm_jax.hub.save import copy_folder, save_params, write_json
from mlcm_jax.images import write_image
from mlcm_jax.outputs import atomic_write, is_remote
from mlcm_jax.plots import plot_loss
from mlcm_jax.training import metrics
from mlcm_jax.training.checkpoint import _absolute
from mlcm_jax.training.metrics import MetricWriter, read_metrics
from mlcm_jax.training.resume import CONFIG_FILE, read_settings

METHODS = ("open", "exists", "isdir", "listdir", "glob", "makedirs", "mkdir", "remove", "replace", "copy", "stat")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder that holds what is written to gs://bucket."""
    disk, opened = backend._OsPathBackend(), []

    def here(value):
        text = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
        return str(tmp_path / text.removeprefix("gs://")) if text.startswith("gs://") else value

    class Bucket(backend._OsPathBackend):
        pass

    for name in METHODS:

        def method(self, *args, name=name, **kwargs):
            if name == "open":
                opened.append(args)
                assert not args[1].startswith("a"), "an object cannot grow"
            return getattr(disk, name)(*map(here, args), **kwargs)

        setattr(Bucket, name, method)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Bucket())
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    (tmp_path / "bucket").mkdir()
    yield tmp_path / "bucket"
    assert opened, "nothing went through the stand-in"


WORKDIR = epath.Path("gs://bucket/runs/one")


def test_paths():
    assert is_remote(WORKDIR) and is_remote("gs://bucket") and not is_remote("/bucket") and not is_remote("runs/one")
    assert str(_absolute(WORKDIR)) == "gs://bucket/runs/one"
    assert _absolute("runs").is_absolute()


def test_files_appear_whole(bucket):
    with pytest.raises(RuntimeError, match="half"), atomic_write(WORKDIR / "file") as f:
        f.write(b"begun")
        raise RuntimeError("half")
    assert list((bucket / "runs" / "one").iterdir()) == []
    write_json({"num_steps": 7, "optim": {"schedule": "cosine"}}, WORKDIR / CONFIG_FILE)
    settings = read_settings(WORKDIR)
    assert settings is not None and (settings.num_steps, settings.optim.schedule, settings.optim.b1) == (
        7,
        "cosine",
        0.9,
    )
    assert [p.name for p in (bucket / "runs" / "one").iterdir()] == [CONFIG_FILE]


def test_metrics_grow_by_being_written_anew(bucket, monkeypatch):
    monkeypatch.setattr(metrics, "EventsWriter", _Events)
    clock = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    writer = MetricWriter(WORKDIR, start_step=0)
    file = bucket / "runs" / "one" / "metrics.jsonl"
    for step, seconds in ((1, 0), (2, 10), (3, 70)):
        clock[0] = 200.0 + seconds
        writer.write(step, {"loss": 1.0 / step})
        assert len(file.read_text().splitlines()) == {1: 1, 2: 1, 3: 3}[step], "at most once a minute"
    writer.write(4, {"loss": 0.25})
    writer.close()
    assert [m["step"] for m in read_metrics(WORKDIR / "metrics.jsonl")] == [1, 2, 3, 4]
    writer = MetricWriter(WORKDIR, start_step=2)
    writer.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]


class _Events:
    """Stands in for tensorboardX's writer, which talks to Google's service itself."""

    def __init__(self, prefix):
        assert prefix == f"{WORKDIR}/tb/events"

    def write_event(self, _): ...

    def flush(self): ...

    def close(self): ...


def test_images_and_an_export(bucket, tmp_path):
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    (WORKDIR / "samples").mkdir(parents=True, exist_ok=True)
    write_image(image, WORKDIR / "samples" / "one.png")
    np.testing.assert_array_equal(np.asarray(Image.open(bucket / "runs/one/samples/one.png")), image)
    plot_loss([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], WORKDIR / "samples" / "loss.png")
    assert Image.open(bucket / "runs/one/samples/loss.png").size[0] > 100

    params = {"conv_in": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.zeros(8)}}
    save_params(params, {"_class_name": "X"}, WORKDIR / "export" / "unet", file_name="model.safetensors")
    saved = load_file(bucket / "runs/one/export/unet/model.safetensors")
    assert saved["conv_in.weight"].shape == (8, 4, 3, 3)
    (tmp_path / "tokenizer" / "deep").mkdir(parents=True)
    (tmp_path / "tokenizer" / "deep" / "vocab.json").write_text("{}")
    copy_folder(tmp_path / "tokenizer", WORKDIR / "export" / "tokenizer")
    assert (bucket / "runs/one/export/tokenizer/deep/vocab.json").read_text() == "{}"
