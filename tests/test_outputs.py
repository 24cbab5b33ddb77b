"""Places for results: tried before the work, said in one sentence, and never left with half a file."""

import contextlib
import os
import resource

import numpy as np
import pytest
from one_sentence import assert_one_sentence

from mlcm_jax.errors import UserError
from mlcm_jax.images import open_image, write_image
from mlcm_jax.outputs import atomic_write, check_file, check_folder, check_image_file, disk_error, disk_reason

IMAGE = np.full((8, 8, 3), 7, np.uint8)


@contextlib.contextmanager
def largest_file(size: int):
    """Files of this process grow to ``size`` bytes: what a full disk is to a program, without a disk to fill."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def places(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "closed").mkdir(mode=0o500)
    return tmp_path


FOLDERS = {
    "file": "is a file: name a folder",
    "file/x/y": "/file, which is no folder",
    "link": "is a link to nothing: name a folder",
    "gs://bucket/x": "is a URL: name a place on this machine",
}
FILES = {
    "folder": "is a folder: name a file",
    "file/x": "/file, which is no folder",
    "link": "is no ordinary file",
    "pipe": "is no ordinary file",
    "gs://bucket/x": "is a URL",
}


def sentence(check, flag, place, *args):
    with pytest.raises(UserError) as error:
        check(flag, place, *args)
    said = str(error.value)
    assert said.startswith(f"--{flag}={place}") and len(said) < 300 and "\n" not in said
    return said


@pytest.mark.parametrize(
    ("check", "name", "words"),
    [(check_folder, *entry) for entry in FOLDERS.items()] + [(check_file, *entry) for entry in FILES.items()],
)
def test_a_place_that_cannot_be_written(places, check, name, words):
    before = sorted(places.rglob("*"))
    assert words in sentence(check, "out", name if "://" in name else places / name)
    assert sorted(places.rglob("*")) == before


@pytest.mark.parametrize("check", [check_folder, check_file])
def test_a_full_disk_and_a_closed_folder(places, check):
    with largest_file(1000):
        assert "cannot be written (File too large)" in sentence(check, "out", places / "new")
    if os.geteuid():  # root may write everywhere
        assert "cannot be written (Permission denied)" in sentence(check, "out", places / "closed" / "new")
    assert not (places / "new").exists()


def test_places_that_can_be_written_are_left_as_they_are(places, monkeypatch):
    monkeypatch.chdir(places)
    before = sorted(places.rglob("*"))
    for name in ("folder", "folder/new/deep", "new", "."):
        check_folder("out", name)
    for name in ("file", "folder/new/deep", "x.json"):
        check_file("out", name)
    check_image_file("out", "x.PNG")
    check_file("out", "x.npy", ".npy")
    assert "must end in .npy" in sentence(check_file, "out", "x.txt", ".npy")
    assert sorted(places.rglob("*")) == before


@pytest.mark.parametrize("name", ["image", "image.txt", "image.xbm", "image.png.tmp", ".png"])
def test_an_image_without_a_suffix_that_says_its_format(tmp_path, name):
    assert "has no suffix of an image file" in sentence(check_image_file, "out", tmp_path / name)


@pytest.mark.parametrize("name", ["x.png", "x.webp", "x.bmp", "x.JPG"])
def test_an_image_is_written_in_the_format_of_its_name(tmp_path, name):
    check_image_file("out", tmp_path / name)
    write_image(IMAGE, tmp_path / name)
    np.testing.assert_allclose(np.asarray(open_image(tmp_path / name)), IMAGE, atol=2)


def test_a_full_disk_leaves_what_was_there(tmp_path):
    (tmp_path / "x").write_text("before")
    too_large = pytest.raises(UserError, match=r"x cannot be written \(File too large\): choose")
    with too_large, largest_file(1000), atomic_write(tmp_path / "x") as f:
        f.write(bytes(10_000))
    assert (tmp_path / "x").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_what_a_library_says_of_a_full_disk():
    from_library = RuntimeError("I/O error: No space left on device (os error 28)")
    wrapped = ValueError("checkpoint")
    wrapped.__cause__ = OSError(28, "No space left on device", "/disk/x")
    assert str(disk_error(from_library)).startswith("A file cannot be written or opened (No space left on device)")
    assert disk_reason(wrapped) == "No space left on device"
    assert str(disk_error(PermissionError(13, "", "/x"))).startswith(
        "/x cannot be written or opened (Permission denied)"
    )
    assert disk_error(FileNotFoundError(2, "No such file", "x")) is None and disk_error(ValueError("x")) is None


PROGRAMS = {
    "sample": (["--prompt=x", "--out={}/x.png"], "out"),
    "sample, its latents": (["--prompt=x", "--save_latents={}/x.npy"], "save_latents"),
    "sample, no suffix": (["--prompt=x", "--out=image"], "has no suffix"),
    "encode": (["--prompts=x", "--out={}/x"], "out"),
    "evaluate": (["--out={}"], "out"),
    "export": (["--workdir=x", "--out={}"], "out"),
    "convert": (["--out={}/x"], "out"),
    "convert, a file": (["--out={}/x.safetensors"], "out"),
    "compile": (["--config=configs/emoji.py", "--out={}/x"], "out"),
    "train": (["--config=configs/emoji.py", "--config.teacher=/no/such/model", "--workdir={}"], "workdir"),
    "train_lpips": (["--images=x", "--heldout=x", "--out={}"], "out"),
    "convert_efficientnet": (["--out={}"], "out"),
    "canny": (["--image=x", "--out={}/x.png"], "out"),
}
WITHOUT_MODEL = ("export", "compile", "train", "convert_efficientnet", "canny")


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_look_before_they_load_anything(launch, places, name):
    """The model does not exist either, which is not what they say."""
    args, flag = PROGRAMS[name]
    program = name.partition(",")[0]
    model = [] if program in WITHOUT_MODEL else ["--model=/no/such/model"]
    result = launch(program, *model, *(arg.format(places / "file") for arg in args))
    assert_one_sentence(result, flag if " " in flag else f"--{flag}={places / 'file'}")
