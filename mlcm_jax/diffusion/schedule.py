"""The noise schedule z_t = alpha_t x0 + sigma_t eps as float32 tables (arXiv 2006.11239, 2010.02502)."""

import math
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mlcm_jax.diffusion.scheduler_config import NUM_TRAIN_TIMESTEPS, read_noise_config
from mlcm_jax.errors import UserError
from mlcm_jax.json_config import ConfigValues
from mlcm_jax.types import Timesteps

Scale = Float[Array, "n 1 1 1"]

# These classes divide by alpha, so that a zero terminal one is lifted to float16's least number.
LIFTED = (
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)
LEAST_ALPHA_CUMPROD = 2.0**-24


@flax.struct.dataclass
class Schedule:
    """A trained model's noise levels and what its output means.

    alphas_cumprod: alpha_t^2 at timesteps 0..999.
    prediction_type: "epsilon", "v_prediction" or "sample" (x0).
    """

    alphas_cumprod: Float[Array, "1000"]
    prediction_type: str = flax.struct.field(pytree_node=False)

    @classmethod
    def from_config(cls, scheduler_config: dict[str, Any]) -> "Schedule":
        """Build the tables that diffusers builds from the same scheduler_config.json.

        Raises UserError for values that are not supported.
        """
        prediction_type = read_noise_config(scheduler_config)["prediction_type"]
        return cls(jnp.asarray(alphas_cumprod_table(scheduler_config)), prediction_type)


def alphas_cumprod_table(scheduler_config: dict[str, Any]) -> Float[np.ndarray, "1000"]:
    """The float32 table of ``Schedule.from_config`` on the host. Raises UserError as it does."""
    values = read_noise_config(scheduler_config)
    alphas_cumprod = np.cumprod(1 - _betas(values), dtype=np.float64).astype(np.float32)
    if values["rescale_betas_zero_snr"] and values.class_name in LIFTED:
        alphas_cumprod[-1] = LEAST_ALPHA_CUMPROD
    if alphas_cumprod[-1] == 0 and values["prediction_type"] == "epsilon":
        raise UserError(
            f"{values.class_name}'s scheduler_config.json joins rescale_betas_zero_snr=True with "
            "prediction_type='epsilon', which cannot tell x0 from pure noise: use v_prediction or sample."
        )
    return alphas_cumprod


def alpha_sigma(schedule: Schedule, timesteps: Timesteps) -> tuple[Scale, Scale]:
    """Signal and noise scale of each example, shaped to multiply latents [n h w c]."""
    alphas_cumprod = schedule.alphas_cumprod[timesteps][:, None, None, None]
    return jnp.sqrt(alphas_cumprod), jnp.sqrt(1 - alphas_cumprod)


def _betas(values: ConfigValues) -> np.ndarray:
    if values["trained_betas"] is not None:
        betas = np.asarray(values["trained_betas"], np.float32)
    else:
        betas = BETA_SCHEDULES[values["beta_schedule"]](values["beta_start"], values["beta_end"])
    if betas.shape != (NUM_TRAIN_TIMESTEPS,) or betas.min() <= 0 or betas.max() > 1:
        raise UserError(
            f"{values.class_name}'s scheduler_config.json must give {NUM_TRAIN_TIMESTEPS} betas in (0, 1]: "
            "correct beta_start, beta_end or trained_betas."
        )
    return _zero_terminal_snr(betas) if values["rescale_betas_zero_snr"] else betas


def _linear(start: float, end: float) -> np.ndarray:
    """Evenly spaced float32, each half counted from its own end: the rounding of torch's linspace."""
    first, last = np.float32(start), np.float32(end)
    step = (last - first) / np.float32(NUM_TRAIN_TIMESTEPS - 1)
    i = np.arange(NUM_TRAIN_TIMESTEPS, dtype=np.float32)
    return np.where(i < NUM_TRAIN_TIMESTEPS // 2, first + step * i, last - step * i[::-1])


def _scaled_linear(start: float, end: float) -> np.ndarray:
    return np.square(_linear(start**0.5, end**0.5))


def _squaredcos_cap_v2(_start: float, _end: float) -> np.ndarray:
    """The cosine schedule, beta capped at 0.999 (arXiv 2102.09672 eq. 17)."""
    u = np.arange(NUM_TRAIN_TIMESTEPS + 1) / NUM_TRAIN_TIMESTEPS
    alpha_bar = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999).astype(np.float32)


def _zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(alphas_cumprod) so that it ends at 0 and begins as before (arXiv 2305.08891 alg. 1)."""
    alphas = np.sqrt(np.cumprod(1 - betas, dtype=np.float64).astype(np.float32))
    shifted = (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))
    alphas_cumprod = np.square(shifted)
    return 1 - np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


BETA_SCHEDULES = {"linear": _linear, "scaled_linear": _scaled_linear, "squaredcos_cap_v2": _squaredcos_cap_v2}
