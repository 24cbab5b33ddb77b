"""Weights and images that are the same in every process and version: how outputs that were recorded with packages
that this project does not install are compared with ours."""

import json
import zlib
from pathlib import Path

import numpy as np

RECORDED = Path(__file__).parent / "evaluation" / "recorded"


def _random(name):
    return np.random.RandomState(zlib.crc32(name.encode()))  # its stream is frozen, unlike default_rng's


def weights(shapes):
    """{name: float32 array} for {name: shape}: norms near one, everything else such that a mistake would show."""
    return {name: _weight(name, tuple(shape)) for name, shape in shapes.items()}


def _weight(name, shape):
    noise = np.asarray(_random(name).standard_normal(shape), np.float32)
    if name.endswith("running_var"):
        return np.exp(0.3 * noise)
    if len(shape) > 1:
        fan_in = shape[0] if "proj" in name.split(".")[-1] or name == "text_projection" else np.prod(shape[1:])
        return noise * np.float32(1.4 / fan_in**0.5)
    return np.asarray(0.3 * noise + np.float32(name.endswith("weight")), np.float32)


def example_images(n, height, width):
    """uint8 [n, height, width, 3]: smooth colours with noise on top."""
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([np.sin(y / 9), np.cos(x / 7), np.sin((x + y) / 5)], axis=-1) * 90 + 128
    noise = _random("pictures").standard_normal((n, height, width, 3)) * 30
    return np.clip(base + noise, 0, 255).astype(np.uint8)


def recorded(name):
    """Outputs that recorded/record.py wrote, and the weights behind them where it wrote their shapes."""
    with np.load(RECORDED / f"{name}.npz") as file:
        arrays = dict(file)
    return arrays, weights(json.loads(str(arrays.get("shapes", "{}"))))
