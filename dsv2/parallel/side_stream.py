"""A second queue of the device, for work that does not depend on the work in between."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Mark = Any  # torch.cuda.Event, a moment of the main queue; None on the CPU, which works in order


class SideStream:
    """Runs work beside the current stream of a GPU. On the CPU the work runs at once."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def mark(self, device: torch.device) -> Mark:
        """Return the present moment of the current stream: all that has been queued so far."""
        return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    @contextmanager
    def after(self, mark: Mark) -> Iterator[None]:
        """Queue the work inside the `with` block on the side, as soon as the main queue has passed `mark`."""
        if mark is None:
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(priority=-1)  # its short kernels go before waiting long ones
        self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            yield

    def join(self, *results: Tensor) -> None:
        """Let the current stream wait for the side. It may then use `results`, which the side has made."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream()
        current.wait_stream(self._stream)
        for result in results:
            result.record_stream(current)  # its memory may not be reused before the current stream is done


class HostNumbers:
    """Numbers of a small tensor on their way from the device to the host."""

    def __init__(self, numbers: Tensor):
        self._host = numbers.to("cpu", non_blocking=True)
        self._arrived: Mark = None
        if numbers.is_cuda:
            self._arrived = torch.cuda.current_stream(numbers.device).record_event()

    def wait(self) -> list[int]:
        """Wait until the device has computed and sent the numbers, and return them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()
