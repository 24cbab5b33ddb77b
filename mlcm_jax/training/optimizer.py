"""The optimizer, AdamW or Adafactor, with gradient clipping and warm-up; the moving average of the parameters."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mlcm_jax.errors import UserError
from mlcm_jax.types import Params

SCHEDULES = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
}


def learning_rate_schedule(
    config: ConfigDict, num_steps: int, restarts: Mapping[int, float] | None = None
) -> optax.Schedule:
    """Linear warm-up for ``warmup_steps``, then ``schedule`` over the rest.

    restarts: {step: learning rate of a schedule, warm-up and all, that begins there}; one ends where the next begins.
    Raises UserError for an unknown name.
    """
    if config.schedule not in SCHEDULES:
        raise UserError(f"optim.schedule={config.schedule!r} is unknown: use one of {', '.join(SCHEDULES)}.")
    peaks = {0: config.learning_rate} | dict(restarts or {})
    starts, warmup = list(peaks), config.warmup_steps

    def piece(peak: float, length: int) -> optax.Schedule:
        after = SCHEDULES[config.schedule](peak, max(length - warmup, 1))
        return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])

    lengths = [end - start for start, end in zip(starts, [*starts[1:], num_steps], strict=True)]
    return optax.join_schedules([piece(*each) for each in zip(peaks.values(), lengths, strict=True)], starts[1:])


def make_optimizer(
    config: ConfigDict, num_steps: int, restarts: Mapping[int, float] | None = None
) -> optax.GradientTransformation:
    """The optimizer of ``config.name`` after clipping by global norm; no weight decay on vectors (norms and biases).

    restarts: as ``learning_rate_schedule`` takes them.
    """
    learning_rate = learning_rate_schedule(config, num_steps, restarts)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), OPTIMIZERS[config.name](config, learning_rate))


def _adamw(config: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """arXiv 1711.05101."""
    return optax.adamw(
        learning_rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        mu_dtype=jnp.dtype(config.moment_dtype),
        weight_decay=config.weight_decay,
        mask=_matrices,
    )


def _adafactor(config: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """arXiv 1804.04235 without first moments, at the given rate: not relative to the size of a weight, which for a
    LoRA's factors is 0 at first. Matrices of fewer than 128 rows or columns keep all their second moments."""
    return optax.adafactor(
        learning_rate,
        multiply_by_parameter_scale=False,
        weight_decay_rate=config.weight_decay or None,
        weight_decay_mask=_matrices,
    )


def _matrices(params: Params) -> Params:
    return jax.tree.map(lambda p: p.ndim > 1, params)


OPTIMIZERS = {"adamw": _adamw, "adafactor": _adafactor}


def update_ema(ema: Params, params: Params, decay: float) -> Params:
    """Exponential moving average; ``decay`` may be traced."""
    return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p.astype(e.dtype) - e), ema, params)
