"""launch/canny.py: the edges that published canny ControlNets were trained with."""

import cv2
import numpy as np
from one_sentence import assert_one_sentence
from PIL import Image, ImageDraw


def test_edges_are_opencv_s(launch, tmp_path):
    image = Image.new("RGB", (48, 32), "white")
    ImageDraw.Draw(image).ellipse((10, 6, 36, 24), fill="red", outline="black")
    ImageDraw.Draw(image).rectangle((2, 26, 40, 30), fill=(240, 240, 240))
    image.save(tmp_path / "image.png")
    args = [f"--image={tmp_path / 'image.png'}", f"--out={tmp_path / 'edges.png'}"]
    assert launch("canny", *args)["status"] == 0
    edges = np.asarray(Image.open(tmp_path / "edges.png"))
    theirs = cv2.Canny(np.asarray(image), 100, 200)  # as diffusers' examples make them
    np.testing.assert_array_equal(edges, np.repeat(theirs[..., None], 3, axis=2))
    assert 0 < (edges > 0).mean() < 0.2
    assert launch("canny", *args, "--low=1.5", "--high=30")["status"] == 0
    more = np.asarray(Image.open(tmp_path / "edges.png"))
    np.testing.assert_array_equal(more[..., 0], cv2.Canny(np.asarray(image), 1.5, 30))
    assert (more > 0).sum() > (edges > 0).sum()


def test_bad_input(launch, tmp_path):
    image, out = tmp_path / "image.png", tmp_path / "edges.png"
    Image.new("RGB", (8, 8)).save(image)
    mistakes = {
        "nowhere.png cannot be read": [f"--image={tmp_path}/nowhere.png", f"--out={out}"],
        "--low=5.0 is above --high=4.0": [f"--image={image}", f"--out={out}", "--low=5", "--high=4"],
        "--high": [f"--image={image}", f"--out={out}", "--high=-1"],
        "--out": [f"--image={image}", f"--out={tmp_path}"],
    }
    for words, args in mistakes.items():
        assert_one_sentence(launch("canny", *args), words)
        assert not out.exists()
