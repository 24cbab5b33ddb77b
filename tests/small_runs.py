"""Settings and values of runs that take moments, shared by the tests of the training step."""

import jax
import numpy as np

from mlcm_jax.config import base
from mlcm_jax.diffusion.schedule import Schedule

SCHEDULE = Schedule.from_config(
    {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
)


def settings(**values):
    config = base()
    config.update({"num_segments": 4, "batch_size": 8, "guidance_scale": 3.0, "compute_dtype": "float32"})
    config.update({"frozen_dtype": "float32", "remat": False, "num_steps": 10})
    # a large eps keeps Adam's first updates smooth in the gradient: rounding must not flip a sign
    config.optim.update({"learning_rate": 1e-3, "warmup_steps": 0, "eps": 1e-3})
    config.update(values)
    return config


def random_like(tree, seed, scale):
    """Values that do not depend on the placement; vectors near 1, so that norms let signals through."""
    rows, generator = jax.tree.leaves(tree), np.random.default_rng(seed)
    values = [(a.ndim == 1) * 0.5 + scale * generator.standard_normal(a.shape, np.float32) for a in rows]
    placed = [jax.device_put(np.asarray(v, a.dtype), a.sharding) for v, a in zip(values, rows, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(tree), placed)
