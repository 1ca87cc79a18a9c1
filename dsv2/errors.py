"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """A mistake in a configuration, a file or a command line.

    The text names the field (or file), its value and what would be right. Entry points print it
    once, from rank 0, without a traceback, and exit with code 2.
    """
