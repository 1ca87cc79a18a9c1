"""What the launcher, `python -m dsv2 train` or torchrun, tells a process. Imports no torch."""

import ctypes
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


def launched_ranks() -> tuple[int, int]:
    """Return (rank, number of processes) as torchrun set them for this process; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_processes() -> int:
    """Return the number of the job's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first_of_machine() -> bool:
    """Return whether this is the first of the job's processes on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def is_on_one_machine() -> bool:
    """Return whether all processes of the job are on this machine."""
    return launched_ranks()[1] == local_processes()


PR_SET_PDEATHSIG = 1  # of Linux's prctl


def stop_with_launcher() -> None:
    """Have the kernel send this process SIGTERM if its launcher dies, so that the job saves and ends.

    SIGKILL gives a launcher no time to pass anything on. A process without a launcher is left alone: its
    parent is a shell that may be closed.
    """
    if "LOCAL_RANK" in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def without_warnings_logged() -> Iterator[None]:
    """Silence warnings during imports. On the CPU, DeepSpeed warns on every rank that there is no GPU."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
