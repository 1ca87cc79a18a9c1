"""Files with one JSON object a line: appended whole, and read back knowing that runs are resumed.

A line has a `"step"`; a step smaller than the one before it starts a resumed session, and what was recorded
from that step on belongs to a past that no checkpoint holds any more.
"""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

from dsv2.errors import UserError


class RecordWriter:
    """Appends to such a file. A line that cannot be written is lost, with one warning a session."""

    def __init__(self, path: Path) -> None:
        _drop_torn_line(path)
        self._path = path
        # No buffer: what a line could not be written from must not linger.
        self._file = io.FileIO(path, "a")
        self._warned = False

    def append(self, record: dict[str, Any]) -> None:
        """Write it whole or not at all: a full disk must not end a run.

        Raises:
            ValueError: NaN or infinity, which JSON does not know.
        """
        data = (json.dumps(record, allow_nan=False) + "\n").encode()
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(data) == len(data):
                return
            problem = "the disk is full"
        except OSError as error:
            problem = str(error)
        with contextlib.suppress(OSError):  # half a line would spoil the next one
            self._file.truncate(before)
        if not self._warned:
            print(f"warning: {self._path.name} could not be written: {problem}", flush=True)
        self._warned = True

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """One dict a step, sorted by step; several lines of one step are merged, later values winning.

    A torn last line, left by a killed process, is skipped.

    Raises:
        UserError: No such file, or a line before the last is not a JSON object with a step.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; is {path.parent} the directory of a run?")
    # A line counts only with its newline: a torn one may be valid JSON by accident.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    rows: dict[int, dict[str, Any]] = {}
    last_step: int | None = None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}, line {number}: not a JSON object with a step: {line[:80]!r}") from error
        if last_step is not None and step < last_step:
            rows = {kept: row for kept, row in rows.items() if kept < step}
        rows.setdefault(step, {}).update(record)
        last_step = step
    return [rows[step] for step in sorted(rows)]


def _drop_torn_line(path: Path) -> None:
    """Cut the half line that a killed process may have left, so that the next line starts on its own."""
    if path.is_file():
        written = path.read_bytes()
        os.truncate(path, written.rfind(b"\n") + 1)
