"""A run's folder: made, seen to be writable, and held by one job at a time."""

import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from dsv2.errors import UserError

LOCK = ".lock"
OWNER = ".lock-owner"


class RunDirError(UserError):
    """Rank 0 alone looks at the folder, so it alone prints what is wrong."""

    of_one_rank = True


def claim(run_dir: Path) -> FileLock:
    """Hold the folder as long as the returned lock, and this process, live. For rank 0, before it starts.

    Two jobs in one folder would write over each other's checkpoints and metrics.

    Raises:
        UserError: it cannot be written to, or another job holds it.
    """
    where = f"runs_dir={run_dir.parent}"
    path = run_dir / LOCK
    lock = FileLock(path, blocking=False)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        # Beside the lock, as taking a lock empties its file; a plain write also shows whether there is room.
        (run_dir / OWNER).write_text(f"process {os.getpid()} of {socket.gethostname()}\n")
    except Timeout:
        raise RunDirError(
            f"name={run_dir.name}: {run_dir} is in use by {_owner(run_dir)}; wait for it to end, or choose "
            "another name=NAME"
        ) from None
    except OSError as error:
        raise RunDirError(
            f"{where}: {run_dir} cannot be written ({error.strerror or error}); make it writable, or choose "
            "another runs_dir=FOLDER"
        ) from None
    return lock


def _owner(run_dir: Path) -> str:
    try:
        return (run_dir / OWNER).read_text().strip()
    except OSError:
        return "another job"
