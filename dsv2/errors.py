"""The exceptions that end a run with one message instead of a traceback.

`UserError` and `Unreadable` are defined in `data`, which imports nothing from dsv2. This module exports the
same classes.
"""

from data.errors import Unreadable, UserError

__all__ = ["CheckpointError", "Diverged", "PeerLost", "Unreadable", "UserError"]


class Diverged(Exception):
    """The loss, the gradient or a weight is no longer a number; the message names the step. Exit code 3."""


class CheckpointError(Exception):
    """A checkpoint could not be written; earlier ones are untouched. Exit code 1 if it was the last one."""


class PeerLost(RuntimeError):
    """A collective failed because another process of the job has ended. Exit code 1."""
