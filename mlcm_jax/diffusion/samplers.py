"""Each diffusers scheduler as a table of numbers: all of them are linear multistep methods.

A sampler here is a function that fills a ``StepTable``; mlcm_jax.diffusion.denoise runs any table.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mlcm_jax.diffusion.schedule import alphas_cumprod_table
from mlcm_jax.diffusion.scheduler_config import LAST_TIMESTEP, NUM_TRAIN_TIMESTEPS, read_sampler_config
from mlcm_jax.diffusion.step_table import StepTable
from mlcm_jax.errors import UserError
from mlcm_jax.json_config import ConfigValues


class Levels(NamedTuple):
    """alphas_cumprod[1000] in float64, the number of steps asked for, TCD's eta, and the first call that is made."""

    alphas_cumprod: np.ndarray
    num_steps: int
    eta: float
    start: int


def step_table(
    scheduler_config: dict[str, Any], num_steps: int, eta: float | int = 0.0, strength: float | int = 1.0
) -> StepTable:
    """The whole sampler as numbers. Raises UserError as ``sample`` does.

    strength: 0 to 1, the part of the steps that is taken, the last ones, as diffusers' image-to-image pipelines take
    them.
    """
    config = read_sampler_config(scheduler_config)
    if not 1 <= num_steps <= NUM_TRAIN_TIMESTEPS:
        raise UserError(f"num_steps={num_steps} is not possible: choose 1 to {NUM_TRAIN_TIMESTEPS}.")
    if (eta and config.class_name != "TCDScheduler") or not 0 <= eta <= 1:
        raise UserError(f"{config.class_name} with eta={eta} is not supported: use 0 (TCDScheduler: 0 to 1).")
    start = num_steps - _taken(num_steps, strength)
    levels = Levels(alphas_cumprod_table(scheduler_config).astype(np.float64), num_steps, eta, start)
    # alpha = 0 at the start of a zero terminal SNR schedule: the weights that divide by it are never used
    with np.errstate(divide="ignore", invalid="ignore"):
        table = SAMPLERS[config.class_name](config, levels)
    return table._replace(prediction_type=config["prediction_type"])


def _taken(num_steps: int, strength: float | int) -> int:
    if not 0 <= strength <= 1:
        raise UserError(f"strength={strength} cannot work: use a number above 0, and 1 at most.")
    taken = int(num_steps * strength)
    if not taken:
        raise UserError(
            f"strength={strength} leaves none of {num_steps} steps: use {math.ceil(1000 / num_steps) / 1000} or more, "
            "or more steps."
        )
    return taken


def _columns(*columns) -> np.ndarray:
    return np.stack(np.broadcast_arrays(*columns), axis=1)


def _table(times: np.ndarray, alphas_cumprod: np.ndarray, **weights) -> StepTable:
    """A table with the weights that are given; those that are not are absent (a width of 0) or neutral."""
    n = len(times)
    absent = np.zeros((n, 0))
    weights = {"sample": absent, "x0": absent, "eps": absent, "noise": np.zeros(n), "input_scale": np.ones(n)} | weights
    whole = (times == np.round(times)).all()
    return StepTable(
        times.astype(np.int32 if whole else np.float32), np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod), **weights
    )


def _checked(times: np.ndarray, config: ConfigValues, num_steps: int) -> np.ndarray:
    inside = times.min() >= 0 and times.max() <= LAST_TIMESTEP
    if not inside or (np.diff(times) >= 0).any():
        raise UserError(
            f"num_steps={num_steps} with {config.class_name}'s timestep_spacing={config['timestep_spacing']!r} and "
            f"steps_offset={config['steps_offset']} leaves 0..{LAST_TIMESTEP} or repeats a timestep: use fewer steps."
        )
    return times


def _spaced(config: ConfigValues, num_steps: int) -> np.ndarray:
    """Falling timesteps, float64 and not yet rounded where they are linspace's (arXiv 2305.08891 table 2)."""
    if config["timestep_spacing"] == "linspace":
        times = np.linspace(0, LAST_TIMESTEP, num_steps)[::-1]
    elif config["timestep_spacing"] == "leading":
        times = (np.arange(num_steps) * (NUM_TRAIN_TIMESTEPS // num_steps))[::-1] + config["steps_offset"]
    else:
        times = _trailing(NUM_TRAIN_TIMESTEPS, num_steps)
    return _checked(times, config, num_steps)


def _trailing(first: int, num_steps: int) -> np.ndarray:
    times = np.round(np.arange(first, 0, -NUM_TRAIN_TIMESTEPS / num_steps)) - 1
    return times[times >= 0]  # for 61 steps and some others the sum of strides falls short of 1000: one step too many


def _at(levels: Levels, times: np.ndarray, final: float) -> np.ndarray:
    """alphas_cumprod at ``times``; below timestep 0 it is ``final``."""
    return np.where(times < 0, final, levels.alphas_cumprod[np.maximum(times, 0)])


def _final_alphas_cumprod(config: ConfigValues, levels: Levels) -> float:
    return 1.0 if config["set_alpha_to_one"] else levels.alphas_cumprod[0]


def _ddim(config: ConfigValues, levels: Levels) -> StepTable:
    """arXiv 2010.02502 eq. 12 with eta = 0."""
    times = np.round(_spaced(config, levels.num_steps)).astype(int)[levels.start :]
    now = levels.alphas_cumprod[times]
    later = _at(levels, times - NUM_TRAIN_TIMESTEPS // levels.num_steps, _final_alphas_cumprod(config, levels))
    clip_range = config["clip_sample_range"] if config["clip_sample"] else np.inf
    table = _table(times, now, x0=_columns(np.sqrt(later)), eps=_columns(np.sqrt(1 - later)))
    return table._replace(clip_range=clip_range)


# Adams-Bashforth weights over the eps of this call and of those before it. Call 1 repeats the first step with the mean
# of two eps, and its own eps is left out of the history after that.
PLMS_WEIGHTS = np.array(
    [
        np.array([24, 0, 0, 0, 0]) / 24,
        np.array([12, 12, 0, 0, 0]) / 24,
        np.array([36, 0, -12, 0, 0]) / 24,
        np.array([46, -32, 0, 10, 0]) / 24,
        np.array([55, -59, 37, 0, -9]) / 24,
        np.array([55, -59, 37, -9, 0]) / 24,
    ]
)


def _pndm(config: ConfigValues, levels: Levels) -> StepTable:
    """Pseudo linear multistep without Runge-Kutta warm-up (arXiv 2202.09778 eq. 9 and 12)."""
    spaced = np.round(_spaced(config, levels.num_steps)).astype(int)
    times = np.insert(spaced, 1, spaced[1:2])[levels.start :]
    calls = np.arange(len(times))
    repeats = calls == 1
    stride = NUM_TRAIN_TIMESTEPS // levels.num_steps
    start = np.minimum(np.where(repeats, times + stride, times), LAST_TIMESTEP)
    now = levels.alphas_cumprod[start]
    later = _at(levels, start - stride, _final_alphas_cumprod(config, levels))
    carry = np.sqrt(later / now)
    eps = (np.sqrt(1 - later) - carry * np.sqrt(1 - now))[:, None] * PLMS_WEIGHTS[np.minimum(calls, 5)]
    sample = _columns(np.where(repeats, 0, carry), np.where(repeats, carry, 0))
    return _table(times, levels.alphas_cumprod[times], sample=sample, eps=eps)


def _sigmas(config: ConfigValues, levels: Levels, times: np.ndarray) -> np.ndarray:
    """sigma / alpha at ``times`` and at the end, [m + 1]."""
    ratio = np.sqrt((1 - levels.alphas_cumprod) / levels.alphas_cumprod)
    last = ratio[0] if config["final_sigmas_type"] == "sigma_min" else 0.0
    return np.append(np.interp(times, np.arange(NUM_TRAIN_TIMESTEPS), ratio), last)


def _euler(config: ConfigValues, levels: Levels) -> StepTable:
    """Euler steps in x = z / alpha over sigma / alpha (arXiv 2206.00364 alg. 2 without churn).

    The step to s is x0 + s eps: the same as x + (s - sigma) eps, which would lose x0 in the rounding of x where sigma
    is 4096, at the start of a zero terminal SNR schedule.
    """
    times = _spaced(config, levels.num_steps)[levels.start :]
    sigmas = _sigmas(config, levels, times)
    alphas_cumprod = 1 / (1 + sigmas[:-1] ** 2)
    table = _table(
        times,
        alphas_cumprod,
        x0=np.ones((len(times), 1)),
        eps=_columns(sigmas[1:]),
        input_scale=np.sqrt(alphas_cumprod),
    )
    largest = sigmas.max()
    leading = config["timestep_spacing"] == "leading"
    return table._replace(init_noise_sigma=float(np.hypot(largest, 1) if leading else largest))


def _distilled_times(config: ConfigValues, levels: Levels) -> np.ndarray:
    num_steps, original = levels.num_steps, config["original_inference_steps"]
    if not num_steps <= original <= NUM_TRAIN_TIMESTEPS:
        raise UserError(
            f"num_steps={num_steps} is not possible with {config.class_name}'s original_inference_steps={original}: "
            f"choose num_steps <= original_inference_steps <= {NUM_TRAIN_TIMESTEPS}."
        )
    trained = np.arange(original, 0, -1) * (NUM_TRAIN_TIMESTEPS // original) - 1
    return trained[np.floor(np.linspace(0, original, num_steps, endpoint=False)).astype(int)][levels.start :]


def _tcd(config: ConfigValues, levels: Levels) -> StepTable:
    """Jumps from edge to edge, the last one to timestep 0; eta > 0 goes deeper and noises back (arXiv 2402.19159)."""
    times = _distilled_times(config, levels)
    later = np.append(times[1:], 0)
    deeper = np.floor(np.float32(1 - levels.eta) * later.astype(np.float32)).astype(int)
    target, reached = levels.alphas_cumprod[later], levels.alphas_cumprod[deeper]
    back = np.sqrt(target / reached)
    return _table(
        times,
        levels.alphas_cumprod[times],
        x0=_columns(back * np.sqrt(reached)),
        eps=_columns(back * np.sqrt(1 - reached)),
        noise=np.sqrt(1 - target / reached),
    )


def _lcm(config: ConfigValues, levels: Levels) -> StepTable:
    """Predict x0, noise it to the next timestep (arXiv 2310.04378 alg. 3); the last prediction is kept as it is."""
    times = _distilled_times(config, levels)
    scaled = times * config["timestep_scaling"]
    sigma_data = 0.5
    skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    out = scaled / np.sqrt(scaled**2 + sigma_data**2)
    later = np.append(levels.alphas_cumprod[times[1:]], 1.0)
    alpha = np.sqrt(later)
    table = _table(
        times,
        levels.alphas_cumprod[times],
        sample=_columns(alpha * skip),
        x0=_columns(alpha * out),
        noise=np.sqrt(1 - later),
    )
    return table._replace(clip_range=config["clip_sample_range"] if config["clip_sample"] else np.inf)


def _dpm_times(config: ConfigValues, levels: Levels) -> np.ndarray:
    """As ``_spaced``, but one interval more, whose end is left out, and nothing below lambda_min_clipped."""
    half_log_snr = 0.5 * np.log(levels.alphas_cumprod / (1 - levels.alphas_cumprod))
    first = int((half_log_snr >= config["lambda_min_clipped"]).sum())
    n = levels.num_steps
    if config["timestep_spacing"] == "linspace":
        times = np.round(np.linspace(0, first - 1, n + 1))[:0:-1]
    elif config["timestep_spacing"] == "leading":
        times = (np.arange(n + 1) * (first // (n + 1)))[:0:-1] + config["steps_offset"]
    else:
        times = _trailing(first, n)
    return _checked(times, config, n).astype(int)


def _dpm_solver_multistep(config: ConfigValues, levels: Levels) -> StepTable:
    """DPM-Solver++ 1S and 2M, midpoint (arXiv 2211.01095 alg. 2)."""
    times = _dpm_times(config, levels)
    short = config["lower_order_final"] and len(times) < 15
    times = times[levels.start :]
    sigmas = _sigmas(config, levels, times)
    alpha = 1 / np.sqrt(1 + sigmas**2)
    sigma, half_log_snr = sigmas * alpha, -np.log(sigmas)
    width = np.diff(half_log_snr)
    slope = 0.5 * width / np.append(np.inf, width[:-1])
    slope[0] = 0
    if config["euler_at_final"] or short or config["final_sigmas_type"] == "zero":
        slope[-1] = 0
    if config["solver_order"] == 1:
        slope[:] = 0
    carry = sigma[1:] / sigma[:-1]
    x0 = alpha[1:] - carry * alpha[:-1]
    return _table(times, alpha[:-1] ** 2, sample=_columns(carry), x0=_columns(x0 * (1 + slope), -x0 * slope))


SAMPLERS: dict[str, Callable[[ConfigValues, Levels], StepTable]] = {
    "DDIMScheduler": _ddim,
    "PNDMScheduler": _pndm,
    "EulerDiscreteScheduler": _euler,
    "TCDScheduler": _tcd,
    "LCMScheduler": _lcm,
    "DPMSolverMultistepScheduler": _dpm_solver_multistep,
}
