"""The optimizer, AdamW or Adafactor, with gradient clipping and warm-up."""

import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mlcm_jax.errors import UserError
from mlcm_jax.rules import NOT_NEGATIVE, POSITIVE, check_rules, one_of
from mlcm_jax.training.stages import Stage
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


def stage_optimizer(stages: Sequence[Stage]) -> optax.GradientTransformation:
    """The optimizer of a run: a stage with another learning rate than the one before begins a schedule of its own."""
    config = stages[0].config
    return make_optimizer(config.optim, config.num_steps, _restarts(stages))


def stage_learning_rate(stages: Sequence[Stage]) -> optax.Schedule:
    """The learning rate of ``stage_optimizer`` at each step (0 for the first)."""
    config = stages[0].config
    return learning_rate_schedule(config.optim, config.num_steps, _restarts(stages))


def _restarts(stages: Sequence[Stage]) -> dict[int, float]:
    rates = [(stage.start, stage.config.optim.learning_rate) for stage in stages]
    return {start: rate for (_, before), (start, rate) in itertools.pairwise(rates) if rate != before}


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


def check(config: ConfigDict) -> None:
    """Raise UserError for settings of the optimizer that cannot work."""
    check_rules(
        config,
        {
            "optim.name": one_of(*OPTIMIZERS),
            "optim.moment_dtype": one_of("float32", "bfloat16"),
            "optim.learning_rate": POSITIVE,
            "optim.warmup_steps": NOT_NEGATIVE,
            "optim.schedule": one_of(*SCHEDULES),
            "optim.clip_norm": POSITIVE,
        },
    )
