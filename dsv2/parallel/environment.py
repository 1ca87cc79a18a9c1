"""What torchrun tells a process through its environment, and imports that keep quiet. Imports no torch."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


def launched_ranks() -> tuple[int, int]:
    """(rank, number of processes) that torchrun gave this process; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_processes() -> int:
    """Number of the job's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def without_warnings_logged() -> Iterator[None]:
    """Silence warnings during imports: DeepSpeed tells every rank that it has no GPU."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
