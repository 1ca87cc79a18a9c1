"""End a job that hangs or has lost a rank, and say which rank it was.

A thread in every rank looks at the rank's `Progress`. If a part takes longer than its limit, the thread calls
all ranks through the store of the process group. Every thread then writes its rank's stacks to the run's
folder and reports where the rank is. The thread that called compares the reports (dsv2/parallel/hang.py) and
publishes a message. All ranks end with that message. The threads also end a job whose rank has died, because
on GPUs the other ranks would wait for it.
"""

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import psutil
import torch.distributed as dist

from dsv2.config.schema import WatchdogConfig
from dsv2.errors import PeerLost
from dsv2.parallel.hang import Report, report_of, verdict
from dsv2.parallel.mesh import Mesh
from dsv2.parallel.plan import Dim
from dsv2.parallel.progress import Part, Position

ROUND_S = 1.0  # how often the thread looks
PAUSE_S = 0.1  # between two looks at a key that somebody will set
ANSWER_S = 5.0  # how long a called rank may take to answer
ALONE_S = 15.0  # a rank that gets no message in this time after a call ends with its own
LOST_S = 6.0  # how long a rank may take to end by itself after another one has died
STORE_TIMEOUT = timedelta(seconds=5)
SLOW_PARTS = (Part.start, Part.evaluation, Part.save, Part.profile)
STACKS = "stacks"  # folder in the run's folder


class Peer(NamedTuple):
    """A rank's process."""

    host: str
    machine: str  # equal for processes that see one another's process ids
    pid: int


def record_collectives(run_dir: Path) -> None:
    """Let NCCL's flight recorder keep the last collectives, and write them to the run's folder on a timeout.

    Call this before the process group starts. The user's own values are kept.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str((run_dir / STACKS / "nccl-rank-").absolute()))


class Watchdog:
    """A context in which a hung or lost rank ends the job.

    Args:
        config: the limits.
        mesh: of the job. Its ranks exchange their process ids: collective.
        run_dir: the stacks go to its folder `stacks`.
        end: called by the thread with the message. It prints the message and ends the process.
    """

    def __init__(self, config: WatchdogConfig, mesh: Mesh, run_dir: Path, end: Callable[[str], None]) -> None:
        self._config = config
        self._mesh = mesh
        self._folder = run_dir / STACKS
        self._end = end
        self._rank = mesh[Dim.world].rank
        own = Peer(socket.gethostname(), _machine(), os.getpid())
        self._peers = dict(enumerate(mesh[Dim.world].objects(own)))
        self._here = {r: p for r, p in self._peers.items() if p.machine == own.machine and p != own}
        self._board = _Board() if mesh[Dim.world].size > 1 else None
        self._first_step: int | None = None
        self._is_over = threading.Event()  # the main thread has left the context
        self._has_decided = threading.Event()
        self._message = ""
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks = (self._folder / f"rank-{self._rank:04d}.txt").open("a", encoding="utf-8")
        # A rank that computes without ever returning to Python can still be asked for its stacks by a signal.
        faulthandler.register(signal.SIGUSR1, self._stacks, all_threads=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching. If another rank is lost, say which one.

        Raises:
            PeerLost: with the rank's name, instead of a PeerLost without it.
        """
        if isinstance(error, PeerLost):
            self._has_decided.wait(LOST_S)
        self._is_over.set()
        self._thread.join()
        faulthandler.unregister(signal.SIGUSR1)
        self._stacks.close()
        with contextlib.suppress(OSError):  # another rank's file may be in the folder
            path = Path(self._stacks.name)
            if not path.stat().st_size:
                path.unlink()
            self._folder.rmdir()
        if isinstance(error, PeerLost) and self._message:
            raise PeerLost(self._message) from error

    def _watch(self) -> None:
        while not self._is_over.wait(ROUND_S):
            if (lost := self._find_lost()) is not None:
                peer = self._peers[lost]
                self._decide(
                    f"rank {lost} on {peer.host} (process {peer.pid}) has ended; its own message says why, "
                    "unless it was killed"
                )
                return self._leave(LOST_S)
            limit = self._passed_limit()
            if limit or (self._board and self._board.is_called()):
                return self._answer(limit)
        return None

    def _find_lost(self) -> int | None:
        """Return a rank of this machine whose process has ended."""
        return next((rank for rank, peer in self._here.items() if not psutil.pid_exists(peer.pid)), None)

    def _passed_limit(self) -> str:
        """Return the limit that this rank has passed, as field=value; "" if none."""
        position = self._mesh.progress.position
        name = self._limit_of(position)
        limit = getattr(self._config, name)
        has_passed = limit > 0 and time.monotonic() - position.since > limit
        return f"watchdog.{name}={limit:g} s" if has_passed else ""

    def _limit_of(self, position: Position) -> str:
        if self._first_step is None and position.step > 0:
            self._first_step = position.step
        is_slow = position.part in SLOW_PARTS or position.step == self._first_step
        return "slow_limit_s" if is_slow else "limit_s"

    def _answer(self, limit: str) -> None:
        """Write the stacks and report. If this rank calls first, compare the reports and decide."""
        is_first = self._board is None or (bool(limit) and self._board.call(self._rank))
        report = self._report()
        self._write_stacks(report)
        if self._board is not None:
            self._board.set_report(self._rank, report)
        if is_first:
            reports = {self._rank: report} if self._board is None else self._collect(report)
            hosts = {rank: peer.host for rank, peer in self._peers.items()}
            text = verdict(reports, hosts, limit)
            self._wake_silent(self._here.keys() - reports.keys())
            self._decide(f"{text}; the stacks of all ranks are in {self._folder}")
        self._leave(0)

    def _report(self) -> Report:
        return report_of(
            self._mesh.progress.position,
            host=self._peers[self._rank].host,
            collectives=self._mesh.collectives,
            now=time.monotonic(),
        )

    def _write_stacks(self, report: Report) -> None:
        begin = f"{time.strftime('%Y-%m-%d %H:%M:%S')}, rank {self._rank} on {report.host}: {report.where}, "
        self._stacks.write(f"{begin}for {report.seconds:.0f} s, at {report.line}\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        _write_flight_record(self._folder / f"nccl-rank-{self._rank}")

    def _collect(self, own: Report) -> dict[int, Report]:
        """Return the reports of all ranks that answer in time."""
        assert self._board is not None
        reports = {self._rank: own}
        deadline = time.monotonic() + ANSWER_S
        for rank in self._peers:
            report = self._board.report(rank, deadline - time.monotonic())
            if report is not None:
                reports[rank] = report
        return reports

    def _wake_silent(self, ranks: set[int]) -> None:
        """Ask these ranks of this machine for their stacks; a stopped process must run to write them."""
        for rank in ranks:
            for number in (signal.SIGUSR1, signal.SIGCONT):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._here[rank].pid, number)

    def _decide(self, message: str) -> None:
        self._message = message if self._board is None else self._board.decide(message)

    def _leave(self, patience_s: float) -> None:
        """Let the main thread end the process within `patience_s`, or end it here."""
        if not self._message:
            assert self._board is not None
            report = self._report()
            own = f"rank {self._rank} on {report.host} hung in {report.where}; no other rank answers"
            self._message = self._board.decision(ALONE_S) or own
        self._has_decided.set()
        if not self._is_over.wait(patience_s):
            self._end(self._message)


class _Board:
    """What the ranks' threads tell one another: keys in the process group's store. A lost store is silent."""

    def __init__(self) -> None:
        default: Any = dist.distributed_c10d._get_default_store()
        store = default.clone()  # a connection that only the thread uses
        store.set_timeout(STORE_TIMEOUT)
        self._store = dist.PrefixStore("watchdog", store)
        self._pause = threading.Event()  # nobody sets it

    def is_called(self) -> bool:
        return bool(self._ask("check", ["call"]))

    def call(self, rank: int) -> bool:
        """Call all ranks. Return whether this rank is the first one that does."""
        answer = self._ask("compare_set", "call", "", str(rank))
        return answer is None or int(answer) == rank

    def set_report(self, rank: int, report: Report) -> None:
        self._ask("set", f"report/{rank}", report.to_json())

    def report(self, rank: int, seconds: float) -> Report | None:
        text = self._wait_for(f"report/{rank}", seconds)
        return None if text is None else Report.from_json(text)

    def decide(self, message: str) -> str:
        """Publish the message unless another one is published. Return the published one."""
        answer = self._ask("compare_set", "message", "", json.dumps(message))
        self._ask("compare_set", "call", "", "-1")
        return message if answer is None else json.loads(answer)

    def decision(self, seconds: float) -> str | None:
        text = self._wait_for("message", seconds)
        return None if text is None else json.loads(text)

    def _wait_for(self, key: str, seconds: float) -> str | None:
        # Not store.wait(): it writes torch's warnings to the terminal when it has waited in vain.
        deadline = time.monotonic() + seconds
        while not self._ask("check", [key]):
            if time.monotonic() > deadline:
                return None
            self._pause.wait(PAUSE_S)
        value = self._ask("get", key)
        return None if value is None else value.decode()

    def _ask(self, call: str, *arguments: Any) -> Any:
        try:
            return getattr(self._store, call)(*arguments)
        except RuntimeError:  # the store's process is gone or stopped, or a wait was too long
            return None


def _machine() -> str:
    """Return a name of the machine and its process ids: containers of one machine have different ones."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"
    return socket.gethostname()


def _write_flight_record(path: Path) -> None:
    """Write NCCL's last collectives, as torch does on a timeout. Without NCCL there are none."""
    dump = getattr(importlib.import_module("torch._C._distributed_c10d"), "_dump_nccl_trace", None)
    if dump is not None and dist.is_initialized() and dist.get_backend() == "nccl":
        # In a thread: the dump waits for NCCL's own locks, and the rank must end all the same.
        thread = threading.Thread(target=lambda: path.write_bytes(dump()), daemon=True)
        thread.start()
        thread.join(ANSWER_S)
