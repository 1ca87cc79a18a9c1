"""The error for a user's mistake: in a text, a folder, an option or the configuration."""


class UserError(ValueError):
    """A mistake in a configuration, a file or a command line.

    The text names the field (or file), its value and what would be right. Entry points print it
    once, from rank 0, without a traceback, and exit with code 2.
    """

    of_one_rank = False  # whether only the rank that raises the error knows of it, and must print it


class OneRankError(UserError):
    """A UserError that only some ranks know of: every rank that raises it prints it."""

    of_one_rank = True
