"""The common entry of the programs in launch/: a user's mistake is one line and exit status 2."""

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict

from mlcm_jax.compilation_cache import use_compilation_cache
from mlcm_jax.errors import UserError, shortened
from mlcm_jax.outputs import disk_error

EXIT_STATUS = 2
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    "",
    "Folder for compiled programs, which the next start reads; off: none. Default: JAX_COMPILATION_CACHE_DIR, else "
    "mlcm_jax/xla below the user's cache folder.",
)


def _fail(error: BaseException) -> NoReturn:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(EXIT_STATUS)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS and _unfit(flags.FLAGS["config"]):
            _fail(_no_config_file(argv))
        _require_finite({name: flags.FLAGS[name].value for name in flags.FLAGS})
        return rest
    except UserError as e:
        _fail(e)
    except flags.Error as e:
        if "get_config() takes 0 positional arguments" in str(e):
            _fail(UserError("This configuration has no variants: leave out what follows the colon."))
        _fail(_innermost_user_error(e) or e)
    except (AttributeError, KeyError) as e:
        unknown = _unknown_setting(e)
        if unknown is None:
            raise
        _fail(unknown)
    except OSError:
        _fail(_no_config_file(argv))


def _require_finite(values: Mapping[str, Any]) -> None:
    """Raise UserError for a number, also in a configuration's groups and lists, that is NaN or infinity."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name}={value} is no finite number: give another, or leave it out for the default.")
        inner = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        if isinstance(inner, Mapping | ConfigDict):
            _require_finite({f"{name}.{key}": each for key, each in inner.items()})


def _unfit(config: flags.Flag) -> bool:
    return bool(config.present) and not isinstance(config.value, ConfigDict)


def _innermost_user_error(error: BaseException | None) -> UserError | None:
    """What a configuration file raised: ml_collections wraps it, and puts its traceback into the text."""
    found = None
    while error is not None:
        found = error if isinstance(error, UserError) else found
        error = error.__cause__ or error.__context__
    return found


def _no_config_file(argv: Sequence[str]) -> UserError:
    given = next((arg for arg in argv if re.match("--?config=", arg)), "--config")
    return UserError(f"{given} is not a configuration file: name one like configs/emoji.py.")


def _unknown_setting(error: Exception) -> UserError | None:
    """What ml_collections says of a name that the locked configuration does not have; None for another error."""
    text = str(error)
    if nearest := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text):
        return UserError(f"The configuration has no setting {nearest[2]!r}: did you mean {nearest[1]!r}?")
    if name := re.search(r"lookup: ([\w.]+)", text) or re.fullmatch(r"\W*(\w+)\W*", text):
        return UserError(f"The configuration has no setting {name[1]!r}: mlcm_jax/config.py explains those it has.")
    return None


def take_defaults(config: ConfigDict | None):
    """Make a configuration's entries the defaults of the flags of their names; raises UserError where one is unfit."""
    for name, value in {} if config is None else config.items():
        if name == "config" or name not in flags.FLAGS:
            raise UserError(f"The configuration has the entry {name!r}, which is no flag of this program.")
        try:
            flags.FLAGS.set_default(name, value)
        except flags.Error as e:
            raise UserError(
                f"The configuration's {name}={shortened(repr(value), 60)} does not fit ({shortened(e)})."
            ) from None


def run_main(main: Callable[[], Any]):
    """Parse absl flags and call ``main()``; UserError and flag errors are printed alone, with exit status 2.

    Libraries' absl messages appear from warnings on, unless --verbosity asks for more.
    """

    def guarded(argv: Sequence[str]):
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            if argv[1:]:
                raise UserError(f"Unexpected argument {argv[1]!r}: settings are given as --name=value.")
            use_compilation_cache(COMPILATION_CACHE.value)
            main()
        except UserError as e:
            _fail(e)
        except Exception as e:
            said = disk_error(e)
            if said is None:
                raise
            _fail(said)

    app.run(guarded, flags_parser=_parse_flags)
