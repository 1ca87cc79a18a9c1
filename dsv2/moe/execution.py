"""How a model runs, as opposed to what it computes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from dsv2.kernels.sets import REFERENCE, KernelSet


class WaitClock:
    """How long the work stood still for exchanges: on a GPU its stream, else this process."""

    def __init__(self) -> None:
        self._host_ms = 0.0
        self._device: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._device.append((start, end))
        else:
            begin = time.perf_counter()
            yield
            self._host_ms += (time.perf_counter() - begin) * 1e3

    def take_ms(self) -> float:
        """Milliseconds since the last call. On a GPU it waits for the last exchange to be over."""
        total, self._host_ms = self._host_ms, 0.0
        pairs, self._device = self._device, []
        if pairs:
            pairs[-1][1].synchronize()
        return total + sum(start.elapsed_time(end) for start, end in pairs)


@dataclass(frozen=True)
class Execution:
    """Passed down to every layer; the default is one process with plain torch."""

    ep_group: dist.ProcessGroup | None = None  # ranks that share one copy of the routed experts; None: one
    recompute: bool = False  # recompute each layer's activations in backward instead of keeping them
    kernels: KernelSet = REFERENCE
    clock: WaitClock = field(default_factory=WaitClock)  # times the experts' exchanges
