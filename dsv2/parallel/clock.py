"""Measure how long a rank waits for other ranks, and how long it works without waiting."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

Events = tuple[torch.cuda.Event, torch.cuda.Event]


class Times(NamedTuple):
    """Milliseconds since the last look at the clock."""

    wait_ms: float  # inside `waiting`
    work_ms: float  # inside `working`, without the waiting in it


class WaitClock:
    """Sums times: on a GPU those of the stream, on the CPU those of this process."""

    def __init__(self) -> None:
        self._host = Times(0.0, 0.0)
        self._waits: list[Events] = []
        self._works: list[tuple[Events, slice]] = []  # with the waits in it

    @contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        """Add the time that passes on `device` inside the `with` block to the waiting."""
        if device.type == "cuda":
            with _between_events() as events:
                yield
            self._waits.append(events)
        else:
            begin = time.perf_counter()
            yield
            self._add(wait_ms=(time.perf_counter() - begin) * 1e3)

    @contextmanager
    def working(self, device: torch.device) -> Iterator[None]:
        """Add the time that passes on `device` inside the `with` block, without its waiting, to the work."""
        if device.type == "cuda":
            first = len(self._waits)
            with _between_events() as events:
                yield
            self._works.append((events, slice(first, len(self._waits))))
        else:
            waited = self._host.wait_ms
            begin = time.perf_counter()
            yield
            passed = (time.perf_counter() - begin) * 1e3
            self._add(work_ms=passed - (self._host.wait_ms - waited))

    def take(self) -> Times:
        """Return the times since the last call. On a GPU, first wait for the last measured operation."""
        host = self._host
        waits = self._waits
        works = self._works
        self._host = Times(0.0, 0.0)
        self._waits = []
        self._works = []
        for _, end in [*waits[-1:], *(events for events, _ in works[-1:])]:
            end.synchronize()
        waited = [start.elapsed_time(end) for start, end in waits]
        worked = [start.elapsed_time(end) - sum(waited[inside]) for (start, end), inside in works]
        return Times(host.wait_ms + sum(waited), host.work_ms + sum(worked))

    def _add(self, wait_ms: float = 0.0, work_ms: float = 0.0) -> None:
        self._host = Times(self._host.wait_ms + wait_ms, self._host.work_ms + work_ms)


@contextmanager
def _between_events() -> Iterator[Events]:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    yield start, end
    end.record()
