"""Rules for settings: what a value must be, and the sentence for one that cannot work. Its owner has the rule."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mlcm_jax.errors import UserError


class Rule(NamedTuple):
    """accepts: whether a value can work. meaning: what it must be, to be put after "it must be"."""

    accepts: Callable[[Any], bool]
    meaning: str


POSITIVE = Rule(lambda v: v > 0, "above 0")
NOT_NEGATIVE = Rule(lambda v: v >= 0, "0 or more")
EVEN = Rule(lambda v: v >= 2 and v % 2 == 0, "an even number above 0")
GIVEN = Rule(bool, "given")


def one_of(*values: Any) -> Rule:
    return Rule(lambda v: v in values, "one of " + ", ".join(values))


def between(low: float, high: float) -> Rule:
    return Rule(lambda v: low <= v <= high, f"from {low} to {high}")


def check_rules(config: ConfigDict, rules: Mapping[str, Rule]) -> None:
    """Raise UserError for the first setting that breaks its rule; keys are dotted names."""
    for key, rule in rules.items():
        value = get(config, key)
        if not rule.accepts(value):
            raise UserError(f"config.{key}={value!r} cannot work: it must be {rule.meaning}.")


def needs(config: ConfigDict, key: str, advice: str, *, because: str) -> None:
    """Raise UserError when the setting ``key`` is empty or 0. because: the setting that asks for it, as KEY=VALUE."""
    if not get(config, key):
        raise UserError(f"config.{because} needs config.{key}: {advice}.")


def get(config: ConfigDict, key: str) -> Any:
    """The value of a dotted name."""
    for part in key.split("."):
        config = config[part]
    return config
