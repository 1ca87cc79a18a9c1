"""A run's metrics.jsonl and maps.jsonl: files with one JSON object per line, appended whole and read back.

Every line has a "step". A step smaller than the previous one starts a resumed session. Whatever an earlier
session recorded from that step on is then discarded, because no checkpoint holds it any more. JSON knows no
NaN or infinity: both are `null` in the files and NaN when metrics are read back.
"""

import contextlib
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.reading import is_file, reading
from dsv2.errors import UserError
from dsv2.training.rundir import MAPS_FILE, METRICS_FILE

__all__ = [
    "MAPS_FILE",
    "METRICS_FILE",
    "NO_METRICS",
    "RecordWriter",
    "read_maps",
    "read_metrics",
    "read_records",
]

NO_METRICS = ("step", "time")  # fields of a row that are no metrics: two equal runs differ in `time`


class RecordWriter:
    """Appends to one file. A line that cannot be written is lost, with one warning per session."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._has_warned = False
        self._file: io.FileIO | None = None
        try:
            _drop_torn_line(path)
            # Unbuffered: after a failed write (disk full) a buffer would flush the same bytes later, into the
            # middle of a line.
            self._file = io.FileIO(path, "a", opener=_open_at_once)
        except OSError as error:
            self._warn(str(error))

    def append(self, record: dict[str, Any]) -> None:
        """Write the line whole or not at all: a full disk must not end a run.

        Raises:
            ValueError: NaN or infinity, which JSON does not know.
        """
        data = (json.dumps(record, allow_nan=False) + "\n").encode()
        if self._file is None:
            return
        size_before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(data) == len(data):
                return
            problem = "the disk is full"
        except OSError as error:
            problem = str(error)
        with contextlib.suppress(OSError):  # half a line would spoil the next one
            self._file.truncate(size_before)
        self._warn(problem)

    def _warn(self, problem: str) -> None:
        if not self._has_warned:
            print(f"warning: {self._path.name} could not be written: {problem}", flush=True)
        self._has_warned = True

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return the run's scalars, `{"step": 12, "time": 1764331200.125, "train/loss_lm": 4.1, ...}`.

    One dict per step, sorted by step. `time` is when the step's last line was written, in Unix seconds; lines
    of earlier versions have none. `null` becomes NaN; see `read_records` for resumed sessions and torn lines.

    Raises:
        UserError: see `read_records`; or a value is no number.
        Unreadable: the file system refuses to read the file.
    """
    path = run_dir / METRICS_FILE
    rows = read_records(path)
    _require(rows, path, _is_number, "no number")
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def read_maps(run_dir: Path) -> list[dict[str, Any]]:
    """Return the heat maps, `{"step": 100, "map/expert_load": rows, ...}`, sorted by step; [] if none.

    Raises:
        UserError: see `read_records`; or a value is no table of numbers.
        Unreadable: the file system refuses to read the file.
    """
    path = run_dir / MAPS_FILE
    if not is_file(path):
        return []
    rows = [row for row in read_records(path) if len(row) > 1]
    _require(rows, path, _is_map, "no table of numbers")
    return rows


def _require(
    rows: list[dict[str, Any]], path: Path, is_right: Callable[[object], bool], problem: str
) -> None:
    """Refuse rows with a value of another kind, so that nobody else must expect it."""
    for row in rows:
        for name, value in row.items():
            if name != "step" and not is_right(value):
                raise UserError(f"{path}, step {row['step']}: {name!r} is {problem}: {repr(value)[:80]}")


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_map(value: object) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(row, list) and row for row in value):
        return False
    cells = [cell for row in value for cell in row]
    finite = all(cell is None or (_is_number(cell) and math.isfinite(cell)) for cell in cells)
    return finite and len({len(row) for row in value}) == 1


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return one dict per step, sorted by step. Lines of the same step are merged; later values win.

    A torn last line, left by a killed process, is skipped.

    Raises:
        UserError: the file does not exist, or a line before the last is not a JSON object with a step.
        Unreadable: the file system refuses to read the file.
    """
    if not is_file(path):
        raise UserError(f"{path}: no such file; is {path.parent} the directory of a run?")
    with reading(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    # A line counts only with its newline: a torn one may be valid JSON by accident.
    lines = text.split("\n")[:-1]
    rows: dict[int, dict[str, Any]] = {}
    last_step: int | None = None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step = record["step"]
            if type(step) is not int:
                raise TypeError(step)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not a JSON object with a step: {line[:80]!r}") from error
        if last_step is not None and step < last_step:
            rows = {kept: row for kept, row in rows.items() if kept < step}
        rows.setdefault(step, {}).update(record)
        last_step = step
    return [rows[step] for step in sorted(rows)]


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting: a pipe without a reader is an error."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def _drop_torn_line(path: Path) -> None:
    """Cut the half line that a killed process may have left, so that the next record gets its own line."""
    if not is_file(path):  # a device would never end
        return
    with reading(path):
        content = path.read_bytes()
    os.truncate(path, content.rfind(b"\n") + 1)
