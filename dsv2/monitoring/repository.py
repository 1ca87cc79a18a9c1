"""The code's git commit, and how the files differ from it."""

import os
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 2.0  # for git, which may have to ask a slow file system
LARGEST_DIFF = 1 << 20  # bytes


class Repository(NamedTuple):
    """What git says about a folder."""

    commit: str | None = None
    changed: tuple[str, ...] = ()  # files that differ from the commit
    untracked: tuple[str, ...] = ()
    diff: bytes = b""  # of the changed files, as `git apply` takes it
    problem: str | None = None  # why git says nothing

    @property
    def version(self) -> str:
        """Return 12 digits of the commit, with "-dirty" if files differ from it; "unknown" without one."""
        if self.commit is None:
            return "unknown"
        return self.commit[:12] + ("-dirty" if self.changed else "")


def read_repository(folder: Path = ROOT) -> Repository:
    """Ask git about the repository that holds the folder, by default this code's.

    The answer never takes longer than `PATIENCE_S`.
    """
    git = ["git", "--no-optional-locks", "-C", str(folder)]
    status = [*git, "status", "--porcelain=v2", "--branch", "--no-renames"]
    changes = [*git, "diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames"]
    until = time.monotonic() + PATIENCE_S
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(_start(status))
        started.append(_start(changes))
        # head ends a diff that is too large, and git with it.
        started.append(_start(["head", "-c", str(LARGEST_DIFF + 1)], read=started[1]))
        text, complaint = started[0].communicate(timeout=until - time.monotonic())
        diff, _ = started[2].communicate(timeout=max(0.0, until - time.monotonic()))
    except FileNotFoundError as error:
        return Repository(problem=f"{error.filename} is not installed")
    except subprocess.TimeoutExpired:
        return Repository(problem=f"git gave no answer in {PATIENCE_S:g} s")
    except OSError as error:
        return Repository(problem=f"git does not start ({error.strerror})")
    finally:
        for process in started:
            process.kill()
            with process:  # closes its pipes and waits for it
                pass
    if started[0].returncode:
        return Repository(problem=complaint.decode(errors="replace").strip().partition("\n")[0])
    return _parsed(text.decode(errors="replace").splitlines(), diff)


def _start(command: list[str], read: subprocess.Popen[bytes] | None = None) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        command,
        stdin=read.stdout if read else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if read or "diff" in command else subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
    )
    if read and read.stdout:
        read.stdout.close()  # so that git notices when head ends
    return process


def _parsed(lines: list[str], diff: bytes) -> Repository:
    """Return the answer in the lines of `git status --porcelain=v2 --branch`."""
    commit = next((line.split()[2] for line in lines if line.startswith("# branch.oid ")), None)
    if commit is None or commit == "(initial)":
        return Repository(problem="the repository has no commit")
    changed = [line.split(" ", 8)[-1] for line in lines if line.startswith("1 ")]
    conflicts = [line.split(" ", 10)[-1] for line in lines if line.startswith("u ")]
    return Repository(
        commit=commit,
        changed=(*changed, *conflicts),
        untracked=tuple(line[2:] for line in lines if line.startswith("? ")),
        diff=diff,
    )
