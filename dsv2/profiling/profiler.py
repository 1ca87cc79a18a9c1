"""Profile some steps of training: a trace and, on a GPU, a snapshot of its memory.

The loop opens `Profiler.step` around every step, and calls `Profiler.finish` after it. The step before the
first profiled one only warms up the profiler. After the last profiled step every rank waits until all files
are written. So no rank waits for another one inside a step, where the watchdog's limit is short.
"""

import contextlib
import gzip
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from dsv2.config.schema import Config
from dsv2.parallel.plan import Dim
from dsv2.parallel.progress import Part
from dsv2.profiling.ranges import marked_step, ranges_of_engine, torch_profiler
from dsv2.profiling.trace import read

FOLDER = "profile"  # in the run's folder
LARGEST = 2**30  # bytes of a trace that is read for the table; Python needs about six times as much
MOST_ENTRIES = 1_000_000  # allocations and frees in a snapshot of the memory
CHUNK = 2**20  # bytes that are compressed at once


class _Outcome(NamedTuple):
    """What one rank has written."""

    table: str = ""  # "" if the rank is not profiled, or has no table
    problem: str = ""


class Profiler:
    """Profiles the steps of `profile.steps` on the ranks of `profile.ranks`. Without steps it does nothing.

    As a context it ends the profiler, whatever ends the run.

    Args:
        engine: the `dsv2.training.engine.Engine` that takes the steps.
        stream: where the steps' data come from.
    """

    def __init__(self, config: Config, engine: Any, stream: Any):
        self._steps = config.profile.steps
        ranks = config.profile.ranks
        self._engine = engine
        self._stream = stream
        self._mesh = engine.mesh
        self._rank = self._mesh[Dim.world].rank
        self._records = ranks is None or self._rank in ranks
        self._has_table = self._rank == (0 if ranks is None else min(ranks))
        self._on_gpu = self._mesh.device.type == "cuda"
        self._next: int | None = None  # the step that the running profiler expects; None: it does not run
        self._torch: Any = None  # torch's profiler, while it runs on this rank
        self._undo = ExitStack()  # ends what runs
        if self._steps is not None:
            self._folder = config.run_dir / FOLDER / "step-{}-{}".format(*self._steps)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile the step if it is due. Its data are fetched inside the context.

        Args:
            number: counted from 1.
        """
        if self._steps is None:
            yield
            return
        if self._next not in (None, number):  # a loss spike has sent the run back to a checkpoint
            self._stop()
        first, _ = self._steps
        # A session may begin with the first profiled step. Then nothing warms the profiler up.
        if number == first - 1 or (number == first and self._next is None):
            self._start()
        elif self._next is None:
            yield
            return
        if number == first:
            self._record()
        with marked_step(self._on_gpu) if self._torch else contextlib.nullcontext():
            yield
        self._next = number + 1

    def finish(self) -> list[str]:
        """Write the files after the last profiled step, and return the lines to print. Collective then."""
        if self._steps is None or self._next != self._steps[1] + 1:
            return []
        self._mesh.progress.enter(Part.profile)
        outcome = self._write() if self._torch else _Outcome()
        self._stop()
        outcomes = self._mesh[Dim.world].objects(outcome)
        first, last = self._steps
        lines = [
            f"warning: profile.steps=[{first},{last}]: rank {rank} has written no profile "
            f"({outcome.problem}); the run continues"
            for rank, outcome in enumerate(outcomes)
            if outcome.problem
        ]
        shown = next((rank for rank, outcome in enumerate(outcomes) if outcome.table), None)
        if shown is not None:
            lines.append(f"profile: steps {first} to {last}, {self._folder}; per step of rank {shown}:")
            lines += [f"  {line}" for line in outcomes[shown].table.splitlines()]
        return lines

    def _start(self) -> None:
        """Begin to warm up."""
        if self._mesh.is_main:  # other ranks write only after steps that they take together with this one
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._records:
            self._undo.enter_context(ranges_of_engine(self._engine, self._stream))
            self._torch = torch_profiler(self._on_gpu)
            self._torch.start()
            self._undo.callback(self._torch.stop)

    def _record(self) -> None:
        """End the warm-up."""
        if not self._torch:
            return
        self._torch.step()
        if self._on_gpu:
            import torch

            torch.cuda.memory._record_memory_history(max_entries=MOST_ENTRIES, stacks="python")
            self._undo.callback(torch.cuda.memory._record_memory_history, enabled=None)

    def _stop(self) -> None:
        self._undo.close()
        self._next = None
        self._torch = None

    def _write(self) -> _Outcome:
        """Write this rank's files."""
        plain = self._folder / f"rank-{self._rank}.trace.json"
        table = ""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._on_gpu:
                import torch

                torch.cuda.memory._dump_snapshot(str(self._folder / f"rank-{self._rank}.memory.pickle"))
            self._undo.close()  # torch's profiler collects its events now
            self._torch.export_chrome_trace(str(plain))
            _require_whole(plain)
            if self._has_table:
                table = _table(plain)
            _compress(plain)
            plain.unlink()
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError):
                for file in self._folder.glob(f"rank-{self._rank}.*"):
                    file.unlink()
            return _Outcome(problem=str(error))
        return _Outcome(table)


def _require_whole(trace: Path) -> None:
    """Raise ValueError if torch has left half a file or none. It raises nothing itself on a full disk."""
    end = b""
    if trace.exists():
        with trace.open("rb") as file:
            file.seek(max(0, trace.stat().st_size - CHUNK))
            end = file.read().rstrip()
    if not end.endswith(b"}"):
        raise ValueError(f"torch could not write {trace}; the disk may be full")


def _table(trace: Path) -> str:
    """Return the table of parts, with a line that says what was measured."""
    size = trace.stat().st_size
    if size > LARGEST:
        return f"no table: the trace has {size / 2**20:.0f} MiB; fewer steps or smaller batches give one"
    breakdown = read(trace)
    kind = "time of the GPU's kernels" if breakdown.on_gpu else "time of the CPU's operations"
    return f"{kind}, with the profiler running\n{breakdown.table()}"


def _compress(file: Path) -> None:
    """Write the file with gzip beside it."""
    with file.open("rb") as source, gzip.open(f"{file}.gz", "wb", compresslevel=5) as target:
        shutil.copyfileobj(source, target, CHUNK)
