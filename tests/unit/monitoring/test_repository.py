"""What git says about the code, and that git can neither stop nor delay a run."""

import subprocess
import time
from pathlib import Path

import pytest

from dsv2.monitoring import repository
from dsv2.monitoring.repository import LARGEST_DIFF, Repository, read_repository


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A repository with one commit."""
    folder = tmp_path / "code"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "a file.py").write_text("one\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_a_clean_commit(code):
    commit = git(code, "rev-parse", "HEAD")
    found = read_repository(code)
    assert found == Repository(commit=commit)
    assert found.version == commit[:12]
    assert read_repository(code / ".." / "code") == found


def test_changes_are_named_and_their_diff_restores_them(code, tmp_path):
    git(code, "worktree", "add", "-q", str(tmp_path / "again"))
    (code / "a file.py").write_text("two\n")
    (code / "new.py").write_text("staged\n")
    git(code, "add", "new.py")
    (code / "left.txt").write_text("untracked\n")
    found = read_repository(code)
    assert (found.changed, found.untracked) == (("a file.py", "new.py"), ("left.txt",))
    assert found.version == f"{found.commit[:12]}-dirty"
    (tmp_path / "diff.patch").write_bytes(found.diff)
    git(tmp_path / "again", "apply", str(tmp_path / "diff.patch"))
    assert (tmp_path / "again" / "a file.py").read_text() == "two\n"
    assert (tmp_path / "again" / "new.py").read_text() == "staged\n"


def test_a_large_diff_is_read_only_in_part(code):
    (code / "a file.py").write_text("x" * (4 * LARGEST_DIFF))
    assert len(read_repository(code).diff) == LARGEST_DIFF + 1


def test_a_folder_without_a_repository_says_so(tmp_path):
    found = read_repository(tmp_path)
    assert found.commit is None
    assert found.problem is not None
    assert found.problem.startswith("fatal: not a git repository")
    assert found.version == "unknown"


def test_a_repository_without_a_commit(tmp_path):
    git(tmp_path, "init", "-q")
    assert read_repository(tmp_path) == Repository(problem="the repository has no commit")


def test_without_git(code, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_repository(code) == Repository(problem="git is not installed")


def test_a_git_that_hangs_is_given_up(code, monkeypatch, tmp_path):
    program = tmp_path / "bin" / "git"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setattr(repository, "PATIENCE_S", 0.2)
    begin = time.monotonic()
    assert read_repository(code) == Repository(problem="git gave no answer in 0.2 s")
    assert time.monotonic() - begin < 20
