"""Inception features against pytorch-fid's, from uint8 images on."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import torch
from recorded_weights import example_images, recorded
from safetensors.numpy import save_file
from torch_weights import assert_close, network_weights

from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.extractors import inception as inception_features
from mlcm_jax.evaluation.extractors.inception import load_inception
from mlcm_jax.evaluation.networks.inception import InceptionV3, Mixed, resize_like_torch


def test_inception_is_pytorch_fid(tmp_path, monkeypatch):
    """Images are enlarged (64) and shrunk (320) on the way; more of them than are encoded at a time."""
    monkeypatch.setattr(inception_features, "CHUNK", 2)
    # The recorded weights depend on torch's names and shapes: a wrong one here would give other features.
    tensors = network_weights(InceptionV3(), np.zeros((1, 299, 299, 3)))
    extra = {"fc.weight": np.zeros((8, 4), np.float32), "Mixed_5b.branch1x1.bn.num_batches_tracked": np.array([3])}
    save_file(tensors | extra, tmp_path / "inception.safetensors")
    inception, (want, _) = load_inception(tmp_path / "inception.safetensors"), recorded("inception")
    assert_close(inception(example_images(2, 64, 64)), want["features_64"])
    large = example_images(2, 320, 320)
    assert_close(inception(large[[0, 1, 0]]), want["features_320"][[0, 1, 0]])
    floats = large.astype(np.float32) / 127.5 - 1
    assert_close(jax.jit(inception.features)(inception.params, floats), want["features_320"])


@pytest.mark.parametrize("max_pool", [False, True])
def test_blocks_are_differentiable(max_pool):
    block = Mixed(((("branch1x1", 4, 1, 1), ("branch7x7", 4, 1, 7)),), pool_features=3, max_pool=max_pool)
    x = jax.random.normal(jax.random.key(0), (1, 6, 6, 5))
    variables = block.init(jax.random.key(1), x)

    def total(x):
        return jnp.square(block.apply(variables, x)).sum()

    jax.test_util.check_grads(jax.jit(total), (x,), order=1, modes=["rev"], atol=0.02, rtol=0.02, eps=1e-3)


@pytest.mark.parametrize("shape", [(40, 64), (320, 350)])
def test_resize_like_torch(shape):
    x = example_images(1, *shape).astype(np.float32)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2), (299, 299), mode="bilinear")
    assert_close(resize_like_torch(jnp.asarray(x)), theirs.permute(0, 2, 3, 1), tolerance=1e-5)


def test_pickles_are_never_read(tmp_path):
    (tmp_path / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"\x80")
    with pytest.raises(UserError, match=r"is a pickle, never read here: convert it"):
        load_inception(tmp_path / "pt_inception-2015-12-05-6726825d.pth")


def test_missing_tensors(tmp_path):
    save_file({"fc.bias": np.zeros(3, np.float32)}, tmp_path / "fc.safetensors")
    with pytest.raises(UserError, match=r"lacks \d+ tensors of the network: Conv2d_1a_3x3\.bn\.bias"):
        load_inception(tmp_path / "fc.safetensors")
