"""Standard streams that cannot end a program: what is printed is only for people to read.

Text from elsewhere (samples, paths, documents) may hold characters that the terminal's encoding lacks. The
reader of a pipe may be gone, and the disk under a log may be full. A file may get a copy of all that is
printed through these streams. What C libraries write to the terminal themselves is not copied.
"""

import contextlib
import io
import os
import sys
from pathlib import Path
from threading import RLock

from data.errors import Unreadable
from data.reading import is_file

EARLY = 1 << 16  # characters that are kept for a file that is not known yet


class _Copy:
    """What both streams print: kept at first, and appended to a file once there is one."""

    def __init__(self) -> None:
        self.early = ""
        self._line = ""  # without its newline yet
        self._number: int | None = None  # the file's descriptor
        self._name = ""
        self._has_warned = False
        self._lock = RLock()  # threads print too

    def begin(self, path: Path, before: str) -> None:
        """Append to the file from now on, `before` first. Only the first call counts."""
        with self._lock:
            if self._name:
                return
            self._name = path.name
            self.early = ""
            try:
                if os.path.lexists(path) and not is_file(path):
                    raise OSError("it is no file")
                self._number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
                is_empty = os.fstat(self._number).st_size == 0
                self.append(before if is_empty or not before else f"\n{before}")
            except (OSError, Unreadable) as error:
                self._warn(error)

    def take(self, text: str) -> None:
        """Take in printed text. Lines stay whole when other processes append to the same file."""
        with self._lock:
            if self._name:
                whole, newline, self._line = (self._line + text).rpartition("\n")
                self._append(whole + newline)
            elif len(self.early) < EARLY:
                self.early += text

    def flush(self) -> None:
        """Append the beginning of a line, too."""
        with self._lock:
            text = self._line
            self._line = ""
            self._append(text)

    def append(self, text: str) -> None:
        """Append to the file at once. A signal's handler may call this.

        Raises:
            OSError: the text could not be written.
        """
        data = text.encode("utf-8", "backslashreplace")
        if self._number is not None and data and os.write(self._number, data) < len(data):
            raise OSError("the disk is full")

    def _append(self, text: str) -> None:
        try:
            self.append(text)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            print(f"warning: {self._name} could not be written: {error}", flush=True)


class _Stream(io.TextIOWrapper):
    """A text stream that escapes what its encoding lacks, and drops what it cannot write."""

    ignored: type[OSError] = OSError
    copy: _Copy

    def write(self, text: str, /) -> int:
        self.copy.take(text)
        try:
            return super().write(text)
        except self.ignored as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        self.copy.flush()
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
    copy = _Copy()
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
        safe.copy = copy
        setattr(sys, name, safe)


def printed_so_far() -> str:
    """Return the first of what this process has printed, about `EARLY` characters; "" if a file gets it."""
    copy = _current_copy()
    return copy.early if copy else ""


def copy_output(path: Path, before: str = "") -> None:
    """Append everything that is printed from now on to a file too; call `make_printing_safe` first.

    A file that cannot be written is one warning line. A second call in the same process does nothing.

    Args:
        before: text to append first.
    """
    if copy := _current_copy():
        copy.begin(path, before)


def print_in_handler(line: str) -> None:
    """Print a line from a signal's handler, which may have interrupted a print().

    The terminal may be gone.
    """
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), f"{line}\n".encode())
    if copy := _current_copy():
        with contextlib.suppress(OSError):
            copy.append(f"{line}\n")


def _current_copy() -> _Copy | None:
    streams = (stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, _Stream))
    return next((stream.copy for stream in streams), None)
