"""A run's folder belongs to one job at a time and is seen to be writable before anything starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv2.errors import UserError
from dsv2.training.rundir import claim

ROOT = Path(__file__).parents[3]


def test_one_job_at_a_time(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from dsv2.training.rundir import claim\n"
        "lock = claim(Path(sys.argv[1])); print('claimed', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "lite")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(UserError, match=rf"name=lite: .*lite is in use by process {other.pid} of "):
            claim(tmp_path / "lite")
        claim(tmp_path / "beside").release()
        other.kill()
    lock = claim(tmp_path / "lite")  # a killed job's claim ends with it
    assert f"process {os.getpid()} of" in (tmp_path / "lite" / ".lock-owner").read_text()
    lock.release()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"runs_dir=.*file: .*cannot be written \(Not a directory\)"):
        claim(tmp_path / "file" / "lite")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str, encoding: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        claim(tmp_path / "lite")
