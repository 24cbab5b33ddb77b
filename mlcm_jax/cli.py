"""The common entry of the programs in launch/: a user's mistake is one line and exit status 2."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags

from mlcm_jax.errors import UserError

EXIT_STATUS = 2


def _fail(error: Exception) -> NoReturn:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(EXIT_STATUS)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as e:
        _fail(e)


def run_main(main: Callable[[], Any]):
    """Parse absl flags and call ``main()``; UserError and flag errors are printed alone, with exit status 2."""

    def guarded(argv: Sequence[str]):
        try:
            if argv[1:]:
                raise UserError(f"Unexpected argument {argv[1]!r}: settings are given as --name=value.")
            main()
        except UserError as e:
            _fail(e)

    app.run(guarded, flags_parser=_parse_flags)
