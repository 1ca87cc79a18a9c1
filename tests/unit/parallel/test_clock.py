"""Waiting and work on the CPU; tests/dist/test_slow_rank.py has the ranks of a job."""

import torch

from dsv2.parallel import clock, progress
from dsv2.parallel.clock import Times, WaitClock
from dsv2.parallel.progress import Part, Progress

CPU = torch.device("cpu")


def test_work_is_the_time_without_waiting(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 3.5, 4.0, 10.0, 10.25, 11.0, 12.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    measured = WaitClock()
    with measured.working(CPU):  # from 0.0 to 10.0
        for _ in range(2):
            with measured.waiting(CPU):  # from 1.0 to 3.0, and from 3.5 to 4.0
                pass
    with measured.waiting(CPU):  # from 10.25 to 11.0
        pass
    assert measured.take() == Times(wait_ms=3250, work_ms=7500)
    assert measured.take() == Times(0, 0)


def test_the_time_for_data_is_what_passes_until_the_next_part(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 8.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    measured = Progress()
    measured.enter(Part.data, 1)  # at 1.0
    measured.enter(Part.compute)  # at 3.0
    measured.enter(Part.data, 2)  # at 7.0
    measured.enter(Part.compute)  # at 8.0
    assert measured.take_data_s() == 3
    assert measured.take_data_s() == 0
    assert measured.position.step == 2
