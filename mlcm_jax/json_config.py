"""Reading JSON settings, such as a network's config.json, against a table of their keys and what each may be."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from mlcm_jax.errors import UserError, listed

LARGEST = 1 << 20  # of sizes: wider than any network, and small enough to count the elements of any shape
MOST_LAYERS = 1000
MOST = 1e30
MOST_SHOWN = 60  # characters of a value in a message


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the values of a key may be. says: the same in words, after "use". as_read: what becomes of such a value."""

    says: str
    holds: Callable[[Any], bool]
    as_read: Callable[[Any], Any] = lambda value: value


Rule = tuple | Kind  # the values that are supported, or their kind
Table = dict[str, tuple[Any, Rule]]  # {key: (default, rule)}
# diffusers' EMAModel writes them into the config.json of the network that it averages, for going on with a training.
EMA_KEYS = {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}


def is_size(value: Any) -> bool:
    """Whether a value is a whole number above 0, as a width or a number of layers is."""
    return _is_whole(value) and 0 < value <= LARGEST


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, in float32, too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < MOST  # which compares whole numbers of any length, and is false for NaN


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def sizes(name: str = "whole numbers above 0", *, each: Callable[[Any], bool] = is_size) -> Kind:
    """A list, not empty, of values that all are ``each``."""
    return Kind(f"a list of {name}", lambda v: isinstance(v, tuple) and 0 < len(v) <= MOST_LAYERS and all(map(each, v)))


def or_null(kind: Kind) -> Kind:
    """What ``kind`` is, or null."""
    return Kind(f"{kind.says} or null", lambda v: v is None or kind.holds(v))


def either(first: Kind, second: Kind) -> Kind:
    """What one of two kinds is."""
    return Kind(f"{first.says} or {second.says}", lambda v: first.holds(v) or second.holds(v))


UNREAD = Kind("anything", lambda _: True)  # of keys that nothing here depends on
SIZE = Kind("a whole number above 0", is_size)
COUNT = Kind("a whole number, 0 or more", lambda v: _is_whole(v) and 0 <= v <= LARGEST)
LAYERS = Kind(f"a whole number from 1 to {MOST_LAYERS}", lambda v: _is_whole(v) and 0 < v <= MOST_LAYERS)
NUMBER = Kind("a number", is_number, float)
NOT_NEGATIVE = Kind("a number, 0 or more", lambda v: is_number(v) and v >= 0, float)
POSITIVE = Kind("a number above 0", lambda v: is_number(v) and v > 1 / MOST, float)
FRACTION = Kind("a number from 0 to 1", lambda v: is_number(v) and 0 <= v <= 1, float)
SIZES = sizes()
NAMES = sizes("names", each=lambda v: isinstance(v, str))
MAPPING = Kind("a JSON object", lambda v: isinstance(v, dict))


class ConfigValues(dict):
    """The validated keys of one config.json; lists are tuples, absent keys have diffusers' default."""

    def __init__(self, values: dict[str, Any], class_name: str, file_name: str):
        super().__init__(values)
        self.class_name = class_name
        self.source = f"{class_name}'s {file_name}"

    def require(self, key: str, *supported: Any) -> Any:
        """Return the value of ``key``, or raise UserError when it is not one of ``supported``."""
        value = self[key]
        same_kind = [s for s in supported if isinstance(s, bool) == isinstance(value, bool)]  # True == 1 in Python
        if value not in same_kind:
            options = listed((_shown(s) for s in supported), " or ")
            raise UserError(f"{self.source} has {key}={_shown(value)}, which is not supported: use {options}.")
        return value

    def check(self, key: str, holds: Any, says: str) -> None:
        """Raise UserError unless ``holds``. says: what the value must be."""
        if not holds:
            raise UserError(f"{self.source} has {key}={_shown(self[key])}, which is not supported: use {says}.")


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    """A value as JSON has it, cut to a part of a line."""
    text = repr(_thawed(value)) if isinstance(value, tuple | list) else repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


def _thawed(value: Any) -> Any:
    return [_thawed(v) for v in value] if isinstance(value, tuple | list) else value


def read_config(
    config: dict[str, Any],
    table: Table,
    class_name: str,
    *,
    file_name: str = "config.json",
    ignored: Collection[str] = EMA_KEYS,
) -> ConfigValues:
    """Check ``config`` against ``table``. ignored: keys that are passed over, as those that begin with an underscore.

    Raises UserError for an unknown key and for a value that is not supported.
    """
    values = ConfigValues(
        {k: _frozen(config.get(k, default)) for k, (default, _) in table.items()}, class_name, file_name
    )
    unknown = [k for k in config if k not in table and k not in ignored and not k.startswith("_")]
    if unknown:
        raise UserError(
            f"{values.source} has keys that are not supported: {listed(unknown)}; remove those that change nothing."
        )
    for key, (_, rule) in table.items():
        if isinstance(rule, Kind):
            values.check(key, rule.holds(values[key]), rule.says)
            values[key] = rule.as_read(values[key])
        else:
            values.require(key, *rule)
    return values
