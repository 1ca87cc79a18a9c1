"""SIGTERM and SIGINT ask the run to finish its step, save and exit. The first signal is answered at once."""

import signal
from types import FrameType, TracebackType

from data.output import print_in_handler
from dsv2.parallel.environment import is_first_of_machine
from dsv2.parallel.mesh import Mesh
from dsv2.parallel.plan import Dim
from dsv2.parallel.progress import Part, Position


class StopSignals:
    """A context in which both signals only set a flag. All ranks agree on the flag."""

    def __init__(self, mesh: Mesh):
        self._everyone = mesh[Dim.world]
        self._progress = mesh.progress
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
        if not self._asked and is_first_of_machine():
            print_in_handler(what_follows(self._progress.position))
        self._asked = True


def what_follows(position: Position) -> str:
    """Return what a run does that is asked to stop at this position."""
    if position.part is Part.evaluation:
        return f"finishing the evaluation after step {position.step}, then saving"
    # The loop looks for signals after a step: while it saves one, it has passed that point.
    step = position.step + 1 if position.part is Part.save else position.step
    return f"finishing step {step}, then saving"
