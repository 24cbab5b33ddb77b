"""The one exception for mistakes that a user can make and mend."""


class UserError(ValueError):
    """A mistake in the input: the message is one sentence that says what is wrong and what to do.

    The programs in launch/ print the message alone, without a traceback, and exit with status 2.
    """
