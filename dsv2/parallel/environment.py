"""Read what torchrun tells a process through its environment; keep imports quiet. Imports no torch."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


def launched_ranks() -> tuple[int, int]:
    """Return (rank, number of processes) as torchrun set them for this process; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_processes() -> int:
    """Return the number of the job's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def without_warnings_logged() -> Iterator[None]:
    """Silence warnings during imports. On the CPU, DeepSpeed warns on every rank that there is no GPU."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
