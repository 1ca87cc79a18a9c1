"""RUN_DIR/console.log: what a run's main process, its launcher and a failing process have printed.

Rank 0 begins the log once it holds the run's folder, so a job that is refused writes nothing there. The
launcher and the processes of its machine share the job's folder (see dsv2/cli/failure.py). There, the
launcher leaves what it has printed, and rank 0 leaves the log's path for whoever has to print an error.
"""

import contextlib
import shlex
import socket
import sys
import time
from pathlib import Path

from data.output import copy_output, printed_so_far
from dsv2.training.rundir import CONSOLE_FILE

PRINTED = "printed"  # in the job's folder: what the launcher printed before the processes started
LOG = "log"  # in the job's folder: the path of console.log


def leave_printed(job_folder: Path) -> None:
    """Leave what this launcher has printed to rank 0."""
    with contextlib.suppress(OSError):  # without it the log begins a few lines later
        (job_folder / PRINTED).write_text(printed_so_far(), encoding="utf-8", errors="backslashreplace")


def begin_log(run_dir: Path, job_folder: Path | None) -> None:
    """Copy to console.log what this session prints, beginning with what it has already printed."""
    path = (run_dir / CONSOLE_FILE).resolve()
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    before = f"===== {when}, {socket.gethostname()}: {shlex.join(sys.orig_argv)}\n"
    if job_folder is not None:
        with contextlib.suppress(OSError):
            if (job_folder / PRINTED).is_file():
                before += (job_folder / PRINTED).read_text(encoding="utf-8")
            job_folder.mkdir(parents=True, exist_ok=True)
            (job_folder / LOG).write_text(str(path), encoding="utf-8")
    copy_output(path, before + printed_so_far())


def join_log(job_folder: Path) -> None:
    """Copy to the session's console.log what this process prints from now on, if rank 0 has begun it."""
    if (job_folder / LOG).is_file():
        copy_output(Path((job_folder / LOG).read_text(encoding="utf-8")))
