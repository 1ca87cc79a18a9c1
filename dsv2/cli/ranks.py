"""Start this machine's processes of train.py, pass signals on to them, and end as they end.

Each process finds its rank in the environment variables that torchrun would set. If one process fails, the
others get `GRACE_S` to end by themselves; then they are killed. Whoever fails first prints one line
(dsv2/cli/failure.py). This module prints a line only for processes that were killed and could print nothing.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dsv2.cli.base import ExitCode, print_error
from dsv2.cli.console_log import join_log, leave_printed
from dsv2.cli.failure import ERROR_FILE, told_code
from dsv2.cli.machines import Machines, Meeting

GRACE_S = 10.0
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ROUND_S = 1.0  # how often other machines are asked for failures


class Ended(NamedTuple):
    """How the processes of this machine have ended."""

    codes: list[int]  # by local rank; below 0: the signal that ended it
    first_failed: int | None  # local rank
    asked: signal.Signals | None  # the signal that asked them to stop
    killed: bool  # some were killed here because they did not end in time


def run_ranks(
    command: list[str], processes: int, machines: Machines, variables: Mapping[str, str], patience_s: float
) -> int:
    """Run the command as `processes` ranks of the job, and return the job's exit code.

    Args:
        command: of every process.
        processes: on this machine.
        machines: of the job.
        variables: environment variables besides this process's own.
        patience_s: after a signal, the processes are killed if they have not ended within this time.

    Raises:
        UserError: the machines do not find one another.
    """
    meeting = Meeting(machines, processes)
    with tempfile.TemporaryDirectory(prefix="dsv2-") as folder, _signals() as signals:
        started: list[subprocess.Popen[bytes]] = []
        leave_printed(Path(folder))
        try:
            for local_rank in range(processes):
                ranks = _rank_variables(meeting, local_rank, processes, Path(folder))
                environment = {**os.environ, **variables, **ranks}
                # In its own session: the terminal's Ctrl-C reaches this process alone, which passes it on.
                started.append(subprocess.Popen(command, env=environment, start_new_session=True))
            ended = _supervise(started, meeting, signals, patience_s)
        finally:
            _kill(started)
        meeting.leave()
        join_log(Path(folder))
        return _exit_code(ended, told_code(Path(folder)), meeting.first_rank)


def _rank_variables(meeting: Meeting, local_rank: int, processes: int, folder: Path) -> dict[str, str]:
    """Return the variables that torchrun would set for a process."""
    return {
        "RANK": str(meeting.first_rank + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(meeting.world_size),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": meeting.host,
        "MASTER_PORT": str(meeting.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is the launcher's, as with torchrun
        ERROR_FILE: str(folder / str(local_rank) / "error.json"),
    }


def _supervise(
    started: list[subprocess.Popen[bytes]],
    meeting: Meeting,
    signals: Callable[[], list[int]],
    patience_s: float,
) -> Ended:
    """Wait until all processes have ended, and see to it that they do."""
    deadline: float | None = None
    asked: signal.Signals | None = None
    first_failed: int | None = None
    killed = False
    while any(process.poll() is None for process in started):
        failed = [rank for rank, process in enumerate(started) if process.poll()]
        if failed and first_failed is None:
            first_failed = failed[0]
            meeting.tell_failure()
        if first_failed is not None or meeting.has_failed_elsewhere():
            deadline = min(deadline or float("inf"), time.monotonic() + GRACE_S)
        for number in signals():
            if asked is signal.SIGINT and number == signal.SIGINT:
                deadline = time.monotonic()  # Ctrl-C again
            asked = asked or signal.Signals(number)
            deadline = min(deadline or float("inf"), time.monotonic() + patience_s)
            for process in started:
                process.send_signal(number)
        if deadline is not None and time.monotonic() >= deadline:
            _kill(started)
            killed = True
    codes = [process.wait() for process in started]
    failed = [rank for rank, code in enumerate(codes) if code]
    if first_failed is None and failed:
        first_failed = failed[0]
        meeting.tell_failure()
    return Ended(codes, first_failed, asked, killed)


def _kill(started: list[subprocess.Popen[bytes]]) -> None:
    for process in started:
        process.kill()  # does nothing if it has ended
        process.wait()


def _exit_code(ended: Ended, told: int | None, first_rank: int) -> int:
    """Return the exit code of the process that printed the error, else of the first that failed."""
    if told is not None:
        return told
    if ended.first_failed is None:
        return ExitCode.ok
    code = ended.codes[ended.first_failed]
    if ended.asked and ended.killed:
        print_error(f"{ended.asked.name}: not every rank ended in time, so all were killed without saving")
        return ExitCode.error
    if ended.asked and -code in STOPPING:
        print_error("interrupted before training began; nothing was changed")
        return ExitCode.interrupted
    if code > 0:  # the process has printed its traceback
        return code
    name = signal.Signals(-code).name
    rank = first_rank + ended.first_failed
    print_error(
        f"rank {rank} on {socket.gethostname()} was ended by {name}; dmesg tells whether memory had run out. "
        "The same command continues from the newest checkpoint"
    )
    return ExitCode.error


@contextmanager
def _signals() -> Iterator[Callable[[], list[int]]]:
    """Give a function that waits for signals: at most `ROUND_S`, or until a process ends.

    It returns the numbers of `STOPPING` that have arrived.
    """
    reader, writer = socket.socketpair()
    with contextlib.ExitStack() as undo, reader, writer:
        writer.setblocking(False)
        reader.setblocking(False)
        undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer.fileno()))
        for number in (*STOPPING, signal.SIGCHLD):
            undo.callback(signal.signal, number, signal.signal(number, lambda *_: None))

        def wait() -> list[int]:
            select.select([reader], [], [], ROUND_S)
            with contextlib.suppress(BlockingIOError):
                return [number for number in reader.recv(4096) if number in STOPPING]
            return []

        yield wait
