"""RUN_DIR/sessions.jsonl: which code and which machines computed a run, with one line per session.

A line is `{"step": 500, "commit": "322d7bb", "device": "NVIDIA H200", "ranks": 16, "hosts": 2}`. `step` is
the number of steps that were done when the session began. Runs of earlier versions have no such file.
"""

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.reading import is_file
from dsv2.errors import UserError
from dsv2.monitoring.records import RecordWriter, read_records
from dsv2.training.rundir import SESSIONS_FILE

if TYPE_CHECKING:
    from dsv2.parallel.mesh import Mesh

ROOT = Path(__file__).resolve().parents[2]


def commit() -> str:
    """Return the code's commit, with "-dirty" if files differ from it; "unknown" outside a repository."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    command = ["git", "--no-optional-locks", "-C", str(ROOT)]
    command += ["describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def record_session(run_dir: Path, mesh: "Mesh", step: int) -> None:
    """Add a line about the session that begins after `step` steps. Rank 0 calls this."""
    device = mesh.device.type
    if device == "cuda":
        import torch

        device = torch.cuda.get_device_name(mesh.device)
    writer = RecordWriter(run_dir / SESSIONS_FILE)
    writer.append(
        {
            "step": step,
            "commit": commit(),
            "device": device,
            "ranks": mesh.plan.world,
            "hosts": len(set(mesh.hosts)),
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
    kinds = {"commit": str, "device": str, "ranks": int, "hosts": int}
    for session in sessions:
        for name, kind in kinds.items():
            if type(session.get(name)) is not kind:
                value = repr(session.get(name))[:80]
                raise UserError(f"{path}, step {session['step']}: {name}={value}: must be {kind.__name__}")
    return sessions
