"""SIGTERM and SIGINT ask the run to finish its step, save and exit."""

import signal
from types import FrameType, TracebackType

from dsv2.parallel.mesh import Mesh
from dsv2.parallel.plan import Dim


class StopSignals:
    """A context in which both signals only set a flag. All ranks agree on the flag."""

    def __init__(self, mesh: Mesh):
        self._everyone = mesh[Dim.world]
        self._asked = False

    def requested(self) -> bool:
        """Return whether any rank has been asked to stop: the same answer on every rank. Collective."""
        return self._everyone.agree(self._asked)

    def __enter__(self) -> "StopSignals":
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
