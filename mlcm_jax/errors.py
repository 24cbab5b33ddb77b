"""The one exception for mistakes that a user can make and mend, and what its messages are made with."""

from collections.abc import Iterable

NUM_LISTED, LENGTH_LISTED = 5, 140


class UserError(ValueError):
    """A mistake in the input: the message is one sentence that says what is wrong and what to do.

    The programs in launch/ print the message alone, without a traceback, and exit with status 2.
    """


def shortened(text: object, length: int = 100) -> str:
    """A text of others, such as an exception's, in one line and cut to ``length`` characters, for messages."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def listed(items: Iterable[str], separator: str = ", ") -> str:
    """The first few of many names, no more than a line, and the number of the others, for messages."""
    items = sorted(shortened(item, LENGTH_LISTED) for item in items)
    count = min(len(items), NUM_LISTED)
    while count > 1 and len(separator.join(items[:count])) > LENGTH_LISTED:
        count -= 1
    rest = f" and {len(items) - count} more" if len(items) > count else ""
    return separator.join(items[:count]) + rest
