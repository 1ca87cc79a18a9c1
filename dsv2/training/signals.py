"""SIGTERM and SIGINT ask the run to finish its step, save and exit."""

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from dsv2.parallel.mesh import Mesh


class StopSignals:
    """While entered, the two signals only set a flag that all ranks agree on."""

    def __init__(self, mesh: Mesh):
        self._mesh, self._asked = mesh, False

    def requested(self) -> bool:
        """Has any rank been asked to stop? The same answer on every rank. Collective."""
        if self._mesh.cpu_group is None:
            return self._asked
        asked = torch.tensor(int(self._asked))
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._mesh.cpu_group)
        return bool(asked)

    def __enter__(self) -> "StopSignals":
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
