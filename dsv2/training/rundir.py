"""A run's folder: made, seen to be writable, and held by one job at a time."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dsv2.errors import UserError

STATUS = "status.json"  # {"state": ..., "step": ..., "total_steps": ...}: see Monitor.status
LOCK = ".lock"
OWNER = ".lock-owner"


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
        raise UserError(
            f"name={run_dir.name}: {run_dir} is in use by {_owner(run_dir)}; wait for it to end, or choose "
            "another name=NAME"
        ) from None
    except OSError as error:
        raise UserError(
            f"{where}: {run_dir} cannot be written ({error.strerror or error}); make it writable, or choose "
            "another runs_dir=FOLDER"
        ) from None
    return lock


def let_go(lock: FileLock, run_dir: Path) -> None:
    """Undo a claim; a folder with nothing else in it is removed."""
    others = [path for path in run_dir.iterdir() if path.name not in (LOCK, OWNER)]
    if not others:
        for name in (OWNER, LOCK):
            (run_dir / name).unlink(missing_ok=True)
        run_dir.rmdir()
    lock.release()


def _owner(run_dir: Path) -> str:
    try:
        return (run_dir / OWNER).read_text().strip()
    except OSError:
        return "another job"


def read_status(run_dir: Path) -> dict[str, Any]:
    """What the run's status.json says; nothing where there is none that can be read."""
    try:
        return json.loads((run_dir / STATUS).read_text())
    except (OSError, ValueError):
        return {}
