"""Standard streams that cannot end a program: what is printed is only for people to read.

Text from elsewhere (samples, paths, documents) may hold characters that the terminal's encoding lacks. The
reader of a pipe may be gone, and the disk under a log may be full.
"""

import io
import os
import sys


class _Stream(io.TextIOWrapper):
    """A text stream that escapes what its encoding lacks, and drops what it cannot write."""

    ignored: type[OSError] = OSError

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except self.ignored as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except self.ignored as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """After a broken pipe, send all further output to nowhere: no reader can come back."""
        if isinstance(error, BrokenPipeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)


def make_printing_safe(ignored: type[OSError] = OSError) -> None:
    """Replace stdout and stderr by streams that raise no error for what is printed.

    Args:
        ignored: failures of stdout to ignore. A command whose result is its output gives BrokenPipeError, so
            that a full disk is still an error. Failures of stderr are all ignored.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):  # closed: Python then prints nothing
            continue
        stream.flush()
        safe = _Stream(
            stream.buffer,
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        safe.ignored = ignored if name == "stdout" else OSError
        setattr(sys, name, safe)
