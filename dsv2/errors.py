"""The exceptions that end a run with one message in place of a traceback."""


class UserError(ValueError):
    """A mistake in a configuration, a file or a command line.

    The text names the field (or file), its value and what would be right. Entry points print it
    once, from rank 0, without a traceback, and exit with code 2.
    """

    of_one_rank = False  # True where only the rank that raises it knows; then that rank prints it


class OneRankError(UserError):
    """A UserError that one rank found alone: every rank that raises it prints it."""

    of_one_rank = True


class Diverged(Exception):
    """The loss or the gradient is no longer a number; the text names the step. Exit code 3."""


class CheckpointError(Exception):
    """A checkpoint could not be written; earlier ones are untouched. Exit code 1 if it was the last."""
