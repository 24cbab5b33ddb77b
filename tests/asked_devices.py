"""Which devices a call of pytest is about."""

import itertools
from collections.abc import Sequence


def wants_gpu(argv: Sequence[str]) -> bool:
    """Whether the tests marked ``gpu`` were asked for, as by ``pytest -m gpu``: jax then takes the device it finds."""
    expressions = [after for flag, after in itertools.pairwise(argv) if flag == "-m"]
    expressions += [arg.removeprefix("-m").lstrip("=") for arg in argv if arg.startswith("-m") and arg != "-m"]
    return any("gpu" in words and "not" not in words for words in (e.split() for e in expressions))
