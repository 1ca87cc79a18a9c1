"""The error for a user's mistake: in a text, a folder, an option or the configuration."""

import argparse
from typing import NoReturn

GO_ON = "run the same command again to continue"  # after a failure or an interruption


class UserError(ValueError):
    """A mistake in a configuration, a file or a command line.

    The text names the field (or file), its value and what would be right. The first process that finds the
    mistake prints it, without a traceback, and exits with code 2.
    """


class Unreadable(Exception):
    """A file or folder exists, or may exist, and cannot be read now. Nothing was changed. Exit code 1."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; of an error without text, its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")
