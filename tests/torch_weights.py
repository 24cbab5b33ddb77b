"""Random torch networks, their way through diffusers' files into Flax parameters, and the comparison of outputs."""

import jax
import numpy as np
import torch
from recorded_weights import weights

from mlcm_jax.hub import names
from mlcm_jax.hub.pipeline import load_network, parameter_shapes


def randomise(module, seed=0):
    """Give every parameter a value that a mistake would show: diffusers zeroes biases and leaves norms at one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.data = noise / p[0].numel() ** 0.5 if "embedding.weight" not in name else 0.5 * noise
        else:
            p.data = 0.3 * noise + (1.0 if p.data.eq(1).all() else 0.0)
    return module.eval()


def through_files(module, folder, class_name=None):
    """The Network that hub.pipeline reads from what ``module.save_pretrained`` writes."""
    module.save_pretrained(folder)
    return load_network(folder, class_name or type(module).__name__)


def network_weights(module, *inputs):
    """Numbers for a Flax module's parameters, under torch's names; ``inputs`` are what its ``__call__`` takes."""
    return weights(named_shapes(parameter_shapes(module, *inputs)))


def named_shapes(params):
    """Torch's names and shapes for a tree of Flax parameters."""
    walk = names.walk(params)
    return {name: names.torch_shape(path, leaf.shape) for path, leaf, ours in walk for name in ours}


def channels_first(array):
    return torch.from_numpy(np.array(array)).permute(0, 3, 1, 2)


def channels_last(tensor):
    return tensor.detach().permute(0, 2, 3, 1).numpy()


def assert_close(ours, theirs, tolerance=1e-4):
    """The largest difference, as a part of the largest value of ``theirs``, is at most ``tolerance``."""
    if isinstance(theirs, torch.Tensor):
        theirs = theirs.detach().numpy()
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def assert_trees_close(ours, theirs, tolerance=1e-4):
    """``assert_close`` for each leaf of two trees of equal structure."""
    jax.tree.map(lambda a, b: assert_close(a, np.asarray(b), tolerance), ours, theirs)
