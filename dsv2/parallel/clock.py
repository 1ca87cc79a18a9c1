"""Measure the time that a rank waits for the experts' exchanges."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class WaitClock:
    """Sums waiting times: on a GPU those of the stream, on the CPU those of this process."""

    def __init__(self) -> None:
        self._host_ms = 0.0
        self._device: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        """Add the time that passes on `device` inside the `with` block."""
        if device.type == "cuda":
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._device.append((start, end))
        else:
            begin = time.perf_counter()
            yield
            self._host_ms += (time.perf_counter() - begin) * 1e3

    def take_ms(self) -> float:
        """Return the milliseconds waited since the last call. On a GPU, first wait for the last exchange."""
        total = self._host_ms
        pairs = self._device
        self._host_ms = 0.0
        self._device = []
        if pairs:
            pairs[-1][1].synchronize()
        return total + sum(start.elapsed_time(end) for start, end in pairs)
