"""Image files as people have them, through the one reader; arrays that are damaged."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mlcm_jax.data.npy import read_npy
from mlcm_jax.errors import UserError
from mlcm_jax.images import open_image

CORNERS = np.array([[0, 60], [120, 240], [30, 90]], np.uint8)  # no turn leaves it as it is


def png(folder, *chunks):
    """A file of these chunks, (kind, data); what follows a broken one is never looked at."""
    body = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    (folder / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    return folder / "x.png"


def header(width, height, bits=8, color=0):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)


@pytest.mark.parametrize("color", [0, 2], ids=["grey", "RGB"])
def test_16_bits_keep_the_upper_8(tmp_path, color):
    values = np.array([[0, 255, 256, 30000, 65535]])
    data = np.repeat(values, 3 if color else 1).astype(">u2").tobytes()
    file = png(tmp_path, header(5, 1, 16, color), (b"IDAT", zlib.compress(b"\0" + data)), (b"IEND", b""))
    image = open_image(file)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.repeat([[0, 0, 1, 117, 255]], 3).reshape(1, 5, 3))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = np.kron(CORNERS, np.ones((16, 16), np.uint8))  # JPEG rounds, within a block little
    stored = {  # what the camera writes so that a viewer who obeys the orientation sees ``large``
        1: large, 2: large[:, ::-1], 3: large[::-1, ::-1], 4: large[::-1],
        5: large.T, 6: np.rot90(large), 7: large[::-1, ::-1].T, 8: np.rot90(large, -1),
    }  # fmt: skip
    Image.fromarray(np.ascontiguousarray(stored[orientation])).save(tmp_path / f"x.{suffix}", exif=exif, quality=100)
    np.testing.assert_allclose(np.asarray(open_image(tmp_path / f"x.{suffix}"))[..., 0], large, atol=3)


def test_colours_by_palette_and_transparency(tmp_path):
    Image.fromarray(CORNERS).convert("P").save(tmp_path / "p.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "p.png"))[..., 1], CORNERS)
    Image.fromarray(np.dstack([CORNERS, CORNERS // 2])).save(tmp_path / "la.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "la.png", "RGBA"))[..., 3], CORNERS // 2)


DAMAGED = {
    "text": lambda f: (f / "x.png").write_text("no image"),
    "empty": lambda f: (f / "x.png").write_bytes(b""),
    "a folder": lambda f: (f / "x.png").mkdir(),
    "cut": lambda f: (Image.new("RGB", (64, 64)).save(f / "x.png"), cut(f / "x.png", 60)),
    "a chunk that is no chunk": lambda f: png(f, (b"\0\0\0\0", b"")),
    "a false checksum": lambda f: flip(png(f, header(2, 2), (b"IDAT", b""), (b"IEND", b"")), 30),
    "more pixels than memory": lambda f: png(f, header(2**30, 2**30), (b"IDAT", b"x"), (b"IEND", b"")),
    "no pixels": lambda f: png(f, header(0, 0), (b"IDAT", b""), (b"IEND", b"")),
    "a header of two bytes": lambda f: png(f, (b"IHDR", b"xx")),
}


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 255
    file.write_bytes(data)


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path, kind):
    DAMAGED[kind](tmp_path)
    with pytest.raises(UserError) as error:
        open_image(tmp_path / "x.png")
    assert "x.png cannot be read as an image (" in str(error.value)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


ARRAYS = {
    "absent": lambda file: None,
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("1 2 3"),
    "cut": lambda file: (np.save(file, np.zeros(100)), cut(file, 300)),
    "cut in its header": lambda file: (np.save(file, np.zeros(100)), cut(file, 20)),
    "pickled": lambda file: np.save(file, np.array([{}]), allow_pickle=True),
    "several": lambda file: np.savez(file.open("wb"), a=np.zeros(1), b=np.zeros(1)),
    "a damaged archive": lambda file: file.write_bytes(b"PK\x03\x04"),
}


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_that_cannot_be_read(tmp_path, kind, mmap):
    ARRAYS[kind](tmp_path / "x.npy")
    with pytest.raises(UserError, match=r"x\.npy (is not a readable|holds several)"):
        read_npy(tmp_path / "x.npy", mmap=mmap)
