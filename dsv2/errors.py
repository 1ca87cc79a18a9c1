"""The exceptions that end a run with one message instead of a traceback.

`UserError` comes from `data`, which imports nothing from dsv2. Importing it from here gives the same class.
"""

from data.errors import OneRankError, UserError

__all__ = ["CheckpointError", "Diverged", "OneRankError", "PeerLost", "UserError"]


class Diverged(Exception):
    """The loss or the gradient is no longer a number; the text names the step. Exit code 3."""


class CheckpointError(Exception):
    """A checkpoint could not be written; earlier ones are untouched. Exit code 1 if it was the last."""


class PeerLost(RuntimeError):
    """A collective failed because another process of the job has ended. Exit code 1."""
