"""What ranks report about a job that makes no progress, and which of them holds it up."""

import json
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from dsv2.parallel.progress import Part, Position

CHECKPOINT_THREAD = "checkpoint"
ROOT = Path(__file__).parents[2]
# A rank whose stack has a frame of these files waits in a collective.
COLLECTIVES = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/", "dsv2/parallel/mesh.py")


@dataclass(frozen=True)
class Report:
    """Where a rank is, as the rank itself reports it."""

    host: str
    step: int
    part: str
    entries: int  # see Position
    collectives: int  # how many this rank has begun
    seconds: float  # since it entered the part
    is_waiting: bool  # in a collective
    line: str  # the innermost line of the project that it runs

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Report":
        return Report(**json.loads(text))

    @property
    def where(self) -> str:
        """Return the step and the part in words."""
        return f"step {self.step}, {self.part}" if self.step else self.part


def report_of(position: Position, *, host: str, collectives: int, now: float) -> Report:
    """Report on this process's main thread, or on the thread that writes a checkpoint for it.

    Another thread calls this.
    """
    threads = [thread for thread in threading.enumerate() if thread.name == CHECKPOINT_THREAD]
    thread = threads[0] if threads and position.part is Part.save else threading.main_thread()
    frames = _frames(sys._current_frames().get(thread.ident or 0))
    files = [frame.f_code.co_filename for frame in frames]
    own = [frame for frame in frames if Path(frame.f_code.co_filename).is_relative_to(ROOT)]
    own = [frame for frame in own if ".venv" not in frame.f_code.co_filename]
    line = "outside of the project"
    if own:
        name = Path(own[0].f_code.co_filename).relative_to(ROOT)
        line = f"{name}:{own[0].f_lineno} ({own[0].f_code.co_name})"
    return Report(
        host=host,
        step=position.step,
        part=position.part,
        entries=position.entries,
        collectives=collectives,
        seconds=now - position.since,
        is_waiting=any(name in file for name in COLLECTIVES for file in files),
        line=line,
    )


def _frames(frame: FrameType | None) -> list[FrameType]:
    """Return the frames of a stack, the innermost first."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def culprits(reports: Mapping[int, Report]) -> list[int]:
    """Return the ranks that hold the job up; [] if all wait alike.

    All ranks run the same program. A rank that waits in a collective waits for ranks that have come less far,
    so the culprits have come least far. Of these, a rank outside of any collective waits for nobody.
    """
    if len(reports) == 1:
        return list(reports)

    def reached(report: Report) -> tuple[int, int, bool]:
        return report.entries, report.collectives, report.is_waiting

    least = min(reached(report) for report in reports.values())
    found = [rank for rank, report in sorted(reports.items()) if reached(report) == least]
    return [] if len(found) == len(reports) else found


def verdict(reports: Mapping[int, Report], hosts: Mapping[int, str], limit: str) -> str:
    """Return the message of a job that hangs: which ranks hold it up, on which host, and where.

    Args:
        reports: of every rank that answered.
        hosts: of every rank. A rank without a report cannot even answer.
        limit: the limit that has passed, such as "watchdog.limit_s=300 s".
    """
    after = f"no progress within {limit}"
    silent = sorted(hosts.keys() - reports.keys())
    if silent:
        names = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in silent)
        where = max(reports.values(), key=lambda report: report.entries).where
        return f"{names} hung and does not answer: {after}; the other ranks wait for it in {where}"
    found = culprits(reports)
    if not found:
        where = next(iter(reports.values())).where
        return f"no single rank hangs: {after}, and every rank waits in {where}; check network and GPUs"
    told = [f"rank {r} on {hosts[r]} hung in {reports[r].where}, at {reports[r].line}" for r in found]
    return f"{', '.join(told)}: {after}"
