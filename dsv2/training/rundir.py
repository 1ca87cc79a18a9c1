"""A run's folder: created, checked to be writable, and held by one job at a time."""

import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from data.reading import reading
from dsv2.errors import UserError

METRICS_FILE = "metrics.jsonl"
MAPS_FILE = "maps.jsonl"
SESSIONS_FILE = "sessions.jsonl"
CONFIG_FILE = "config.yaml"
CONSOLE_FILE = "console.log"
LOCK = ".lock"
OWNER = ".lock-owner"


def claim(run_dir: Path) -> FileLock:
    """Hold the folder while the returned lock and this process live. Rank 0 calls this before training.

    Two jobs in one folder would overwrite each other's checkpoints and metrics.

    Raises:
        UserError: the folder cannot be written, or another job holds it.
    """
    where = f"runs_dir={run_dir.parent}"
    path = run_dir / LOCK
    lock = FileLock(path, blocking=False)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        _require_files(run_dir)
        # In a separate file, because taking the lock empties the lock file. This write also shows whether the
        # disk has room.
        (run_dir / OWNER).write_text(f"process {os.getpid()} of {socket.gethostname()}\n", encoding="utf-8")
    except Timeout:
        raise UserError(
            f"name={run_dir.name}: {run_dir} is in use by {_owner(run_dir)}; wait for it to end, or choose "
            "another name=NAME"
        ) from None
    except OSError as error:
        raise UserError(
            f"{where}: {error.filename or run_dir} cannot be written ({error.strerror or error}); make it "
            "writable, or choose another runs_dir=FOLDER"
        ) from None
    return lock


def _require_files(run_dir: Path) -> None:
    """Open every file that the run will write and that already exists.

    Raises:
        OSError: one of them is a folder, or cannot be written.
    """
    for name in (METRICS_FILE, MAPS_FILE, CONFIG_FILE):
        if (path := run_dir / name).exists():
            path.open("ab").close()


def let_go(lock: FileLock, run_dir: Path) -> None:
    """Undo a claim, and remove the folder if it holds nothing else."""
    if all(path.name in (LOCK, OWNER) for path in run_dir.iterdir()):
        for name in (OWNER, LOCK):
            (run_dir / name).unlink(missing_ok=True)
        run_dir.rmdir()
    lock.release()


def _owner(run_dir: Path) -> str:
    try:
        return (run_dir / OWNER).read_text(encoding="utf-8").strip()
    except OSError:
        return "another job"


def save_config(run_dir: Path, yaml: str, *, resumed: bool) -> None:
    """Write the resolved configuration to the folder. A resumed run keeps an earlier, different file."""
    run_dir.mkdir(parents=True, exist_ok=True)
    target = run_dir / CONFIG_FILE
    try:
        with reading(target):
            earlier = target.read_bytes()
    except FileNotFoundError:
        earlier = None
    if resumed and earlier not in (None, yaml.encode()):
        count = len(list(run_dir.glob("config.*.yaml")))
        target.rename(run_dir / f"config.{count}.yaml")
    target.write_text(yaml, encoding="utf-8")
