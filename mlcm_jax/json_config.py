"""Reading a network's config.json against a table of its keys and the values that are supported."""

from typing import Any

from mlcm_jax.errors import UserError

Table = dict[str, tuple[Any, tuple | None]]
# diffusers' EMAModel writes them into the config.json of the network that it averages, for going on with a training.
EMA_KEYS = {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}


class ConfigValues(dict):
    """The validated keys of one config.json; lists are tuples, absent keys have diffusers' default."""

    def __init__(self, values: dict[str, Any], class_name: str, file_name: str):
        super().__init__(values)
        self.class_name = class_name
        self.source = f"{class_name}'s {file_name}"

    def require(self, key: str, *supported: Any) -> Any:
        """Return the value of ``key``, or raise UserError when it is not one of ``supported``."""
        if self[key] not in supported:
            options = ", ".join(repr(s) for s in supported)
            raise UserError(f"{self.source} has {key}={self[key]!r}, which is not supported: use {options}.")
        return self[key]


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


def read_config(
    config: dict[str, Any], table: Table, class_name: str, *, file_name: str = "config.json"
) -> ConfigValues:
    """Check ``config`` against ``table`` {key: (default, supported values or None for any)}.

    Keys that start with an underscore are metadata and pass. Raises UserError for an unknown key and for a value
    that is not supported.
    """
    values = ConfigValues(
        {k: _frozen(config.get(k, default)) for k, (default, _) in table.items()}, class_name, file_name
    )
    unknown = sorted(k for k in config if k not in table and k not in EMA_KEYS and not k.startswith("_"))
    if unknown:
        raise UserError(
            f"{values.source} has keys that are not supported: {', '.join(unknown)}; supported are {', '.join(table)}."
        )
    for key, (_, supported) in table.items():
        if supported is not None:
            values.require(key, *supported)
    return values
