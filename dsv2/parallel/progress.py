"""Where a rank is in its job: the step, the part of the step, and since when. Imports no torch."""

import time
from enum import StrEnum
from typing import NamedTuple


class Part(StrEnum):
    """The parts of a job, as messages name them."""

    start = "start"
    data = "data"
    compute = "forward and backward"
    optimizer = "optimizer"
    report = "report"
    evaluation = "evaluation"
    save = "save"
    profile = "profile"  # writing it


class Position(NamedTuple):
    """Where a rank is."""

    step: int  # counted from 1; 0 before the first step
    part: Part
    entries: int  # how many parts, also of earlier steps, this rank has entered
    since: float  # time.monotonic() when it entered this part


class Progress:
    """Where this rank is. The watchdog's thread reads `position` while the rank changes it."""

    def __init__(self) -> None:
        self.position = Position(0, Part.start, 0, time.monotonic())
        self._data_s = 0.0

    def enter(self, part: Part, step: int | None = None) -> None:
        """Enter a part, of the same step unless `step` is given. A long part is entered again each round."""
        before = self.position
        now = time.monotonic()
        if before.part is Part.data:
            self._data_s += now - before.since
        # One assignment, so that another thread never reads half a position.
        self.position = Position(before.step if step is None else step, part, before.entries + 1, now)

    def take_data_s(self) -> float:
        """Return the seconds that this rank has spent on fetching data since the last call."""
        taken = self._data_s
        self._data_s = 0.0
        return taken
