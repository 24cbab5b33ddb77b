"""A sampler as numbers: what mlcm_jax.diffusion.samplers makes and mlcm_jax.diffusion.denoise runs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlcm_jax.diffusion.scheduler_config import NUM_TRAIN_TIMESTEPS

MAX_CALLS = NUM_TRAIN_TIMESTEPS + 1  # PNDM calls the network once more than there are steps


class StepTable(NamedTuple):
    """One row a network call: x_{i+1} = sum_j sample_ij x_{i-j} + x0_ij x0_{i-j} + eps_ij eps_{i-j} + noise_i n_i.

    The network is given input_scale_i x_i at timesteps_i; alpha_i and sigma_i are the noise level of that input, by
    which its output, of prediction_type, becomes x0_i and eps_i; x0 is clipped to +-clip_range. n_i is fresh normal
    noise.
    The first x is init_noise_sigma times standard normal noise plus init_image times an image's latents.
    """

    timesteps: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    sample: np.ndarray
    x0: np.ndarray
    eps: np.ndarray
    noise: np.ndarray
    input_scale: np.ndarray
    init_noise_sigma: float = 1.0
    init_image: float = 0.0
    clip_range: float = np.inf
    prediction_type: str = "epsilon"

    def from_image(self) -> "StepTable":
        """The table whose first x is an image at the noise level of the first call."""
        alpha, sigma = (float(level[0] / self.input_scale[0]) for level in (self.alpha, self.sigma))
        return self._replace(init_image=alpha, init_noise_sigma=sigma)

    @property
    def arrays(self) -> dict[str, jax.Array]:
        """The numbers as arguments of a compiled program: the columns, padded to one length whatever the number of
        steps, float32 (timesteps keep their type), and with them num_calls and the scalars."""
        columns = {k: v for k, v in self._asdict().items() if isinstance(v, np.ndarray)}
        missing = MAX_CALLS - len(self.timesteps)
        padded = {k: np.pad(v, [(0, missing)] + [(0, 0)] * (v.ndim - 1)) for k, v in columns.items()}
        arrays = {k: jnp.asarray(v, None if k == "timesteps" else jnp.float32) for k, v in padded.items()}
        scalars = {k: jnp.float32(v) for k, v in self._asdict().items() if isinstance(v, float)}
        return arrays | scalars | {"num_calls": jnp.int32(len(self.timesteps))}
