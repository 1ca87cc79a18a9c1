"""RUN_DIR/sessions.jsonl: which code, packages and machines computed a run, with one line per session.

A line begins as `{"step": 500, "time": 1764331200.125, "commit": "322d7bb1c2d3-dirty", "device": "NVIDIA
H200", "ranks": 16, "hosts": 2, ...}`. `step` is the number of steps that were done when the session began.
If files differ from the commit, their diff is in a file beside it, `diff-TIME.patch`. Lines are only
appended, so a session on another machine or commit leaves the earlier ones.
"""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.reading import is_file
from dsv2.errors import UserError
from dsv2.monitoring.environment import machines, masked, variables, versions
from dsv2.monitoring.records import RecordWriter, read_records
from dsv2.monitoring.repository import LARGEST_DIFF, Repository, read_repository
from dsv2.training.rundir import SESSIONS_FILE

if TYPE_CHECKING:
    from dsv2.parallel.mesh import Mesh

MOST_FILES = 100  # names of changed files, and of untracked ones
KINDS = {"commit": str, "device": str, "ranks": int, "hosts": int}
LATER_KINDS = {  # lines of the first version lack these
    "command": list,
    "folder": str,
    "changed": list,
    "untracked": list,
    "diff": str,
    "versions": dict,
    "machines": list,
    "variables": dict,
}


def record_session(run_dir: Path, mesh: "Mesh", step: int, processes: list[dict[str, Any]]) -> None:
    """Add a line about the session that begins after `step` steps. Rank 0 calls this.

    A file that cannot be written is one warning line.

    Args:
        processes: of each rank, its `this_process`.
    """
    now = time.time()
    repository = read_repository()
    writer = RecordWriter(run_dir / SESSIONS_FILE)
    writer.append(
        {
            "step": step,
            "time": round(now, 3),
            "commit": repository.version,
            "device": processes[0]["gpu"] or mesh.device.type,
            "ranks": mesh.plan.world,
            "hosts": len(set(mesh.hosts)),
            "command": [masked(word) for word in sys.orig_argv],
            "folder": os.getcwd(),
            "changed": _some(repository.changed),
            "untracked": _some(repository.untracked),
            "diff": _keep_diff(repository, run_dir, now),
            "versions": versions(),
            "machines": machines(processes),
            "variables": variables(os.environ),
        }
    )
    writer.close()


def read_sessions(run_dir: Path) -> list[dict[str, Any]]:
    """Return the sessions in the order of their first steps; [] if there is no file.

    A session that began at the same step as a later one, or after it, is left out: its steps are lost.

    Raises:
        UserError: see `read_records`; or a value has another type than `record_session` writes.
        Unreadable: the file system refuses to read the file.
    """
    path = run_dir / SESSIONS_FILE
    if not is_file(path):
        return []
    sessions = read_records(path)
    for session in sessions:
        for name, kind in (KINDS | {n: kind for n, kind in LATER_KINDS.items() if n in session}).items():
            if type(session.get(name)) is not kind:
                value = repr(session.get(name))[:80]
                raise UserError(f"{path}, step {session['step']}: {name}={value}: must be {kind.__name__}")
    return sessions


def _some(files: tuple[str, ...]) -> list[str]:
    return [*files[:MOST_FILES], *(["..."] if len(files) > MOST_FILES else [])]


def _keep_diff(repository: Repository, run_dir: Path, now: float) -> str:
    """Write the diff beside the record; return the file's name, or why there is none."""
    if repository.problem is not None:
        return f"unknown: {repository.problem}"
    if not repository.diff:
        return "none"
    if len(repository.diff) > LARGEST_DIFF:
        return f"not kept: larger than {LARGEST_DIFF} bytes"
    patch = run_dir / time.strftime("diff-%Y%m%dT%H%M%SZ.patch", time.gmtime(now))
    try:
        patch.write_bytes(repository.diff)
    except OSError as error:
        print(f"warning: {patch.name} could not be written: {error}", flush=True)
        return f"not kept: {error.strerror}"
    return patch.name
