"""sessions.jsonl: which code and machines computed a run, session by session."""

import json
import os
from pathlib import Path

import pytest
import torch

from dsv2.errors import UserError
from dsv2.monitoring import sessions
from dsv2.monitoring.environment import this_process, versions
from dsv2.monitoring.repository import LARGEST_DIFF, Repository
from dsv2.monitoring.sessions import read_sessions, record_session
from dsv2.parallel.mesh import Mesh
from dsv2.parallel.plan import ParallelPlan

COMMIT = "c" * 40
SECRETS = {"WANDB_API_KEY": "0123456789" * 4, "HF_TOKEN": "hf_abcdefgh", "NCCL_AUTH_TOKEN": "a-word-of-mine"}


@pytest.fixture
def mesh() -> Mesh:
    """Three ranks on two machines."""
    mesh = Mesh(torch.device("cpu"))
    mesh.plan = ParallelPlan(world=3)
    mesh.hosts = ["a", "a", "b"]
    return mesh


@pytest.fixture
def git_says(monkeypatch):
    """Replace git's answer: git_says(commit=..., ...)."""

    def say(**answer) -> None:
        monkeypatch.setattr(sessions, "read_repository", lambda: Repository(**answer))

    return say


def record(run_dir: Path, mesh: Mesh, step: int = 0) -> None:
    record_session(run_dir, mesh, step, [this_process(mesh.device)] * 3)


def test_each_session_keeps_its_record_and_its_diff(git_says, monkeypatch, tmp_path, mesh):
    times = iter([1_800_000_000.1239, 1_800_000_060.0])
    monkeypatch.setattr(sessions.time, "time", lambda: next(times))
    monkeypatch.setattr(sessions.sys, "orig_argv", ["python", "train.py", "name=x"])
    git_says(commit=COMMIT, changed=("a.py",), untracked=("b.py",), diff=b"the diff\n")
    record(tmp_path, mesh)
    git_says(problem="git is not installed")
    record(tmp_path, mesh, step=40)
    lines = [json.loads(line) for line in (tmp_path / "sessions.jsonl").read_text().splitlines()]
    assert read_sessions(tmp_path) == lines
    first, second = lines
    known = {"step": 0, "time": 1800000000.124, "commit": "c" * 12 + "-dirty", "device": "cpu"}
    known |= {"ranks": 3, "hosts": 2, "command": ["python", "train.py", "name=x"], "folder": os.getcwd()}
    known |= {"changed": ["a.py"], "untracked": ["b.py"], "diff": "diff-20270115T080000Z.patch"}
    assert {name: first[name] for name in known} == known
    assert (tmp_path / known["diff"]).read_bytes() == b"the diff\n"
    assert first["versions"] == versions()
    assert [machine["processes"] for machine in first["machines"]] == [3]
    assert (second["step"], second["commit"]) == (40, "unknown")
    assert second["diff"] == "unknown: git is not installed"
    assert [path.name for path in tmp_path.glob("*.patch")] == [known["diff"]]


def test_a_large_diff_is_not_kept(git_says, tmp_path, mesh):
    git_says(commit=COMMIT, changed=tuple("abc" * 50), diff=b"x" * (LARGEST_DIFF + 1))
    record(tmp_path, mesh)
    (session,) = read_sessions(tmp_path)
    assert session["diff"] == f"not kept: larger than {LARGEST_DIFF} bytes"
    assert len(session["changed"]) == 101
    assert session["changed"][-1] == "..."
    assert [path.name for path in tmp_path.iterdir()] == ["sessions.jsonl"]


def test_files_that_cannot_be_written_are_warnings(git_says, capsys, tmp_path, mesh):
    git_says(commit=COMMIT, changed=("a.py",), diff=b"the diff\n")
    (tmp_path / "sessions.jsonl").mkdir()
    record(tmp_path, mesh)
    (warning,) = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: sessions.jsonl could not be written: ")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "sessions.jsonl")  # to open it would wait for ever
    record(tmp_path / "pipe", mesh)
    assert capsys.readouterr().out.startswith("warning: sessions.jsonl could not be written: ")
    record(tmp_path / "missing", mesh)
    warnings = sorted(capsys.readouterr().out.splitlines())
    assert [line.split(" could not be written: ")[0] for line in warnings] == [
        f"warning: {Path(warnings[0].split()[1])}",
        "warning: sessions.jsonl",
    ]
    assert warnings[0].startswith("warning: diff-20")


def test_nothing_secret_reaches_the_file(git_says, monkeypatch, tmp_path, mesh):
    git_says(problem="none")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sessions.sys, "orig_argv", ["train.py", "data.data_files=[https://me:word@host/a]"])
    record(tmp_path, mesh)
    text = (tmp_path / "sessions.jsonl").read_text()
    assert not [value for value in [*SECRETS.values(), "word"] if value in text]


def test_a_session_whose_steps_are_lost_is_left_out(git_says, tmp_path, mesh):
    """Sessions began after the steps 0, 40, 80; the last one went back to step 40."""
    git_says(problem="none")
    for step in (0, 40, 80):
        record(tmp_path, mesh, step)
    mesh.hosts = ["c", "c", "c"]
    record(tmp_path, mesh, step=40)
    assert [(session["step"], session["hosts"]) for session in read_sessions(tmp_path)] == [(0, 2), (40, 1)]
    assert len((tmp_path / "sessions.jsonl").read_text().splitlines()) == 4, "none is erased"


def test_an_older_run_has_no_sessions(tmp_path):
    assert read_sessions(tmp_path) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 4, "commit": "a", "device": "cpu", "ranks": "2", "hosts": 1}', "ranks='2': must be int"),
        ('{"step": 4, "commit": "a", "device": "cpu", "ranks": 2, "hosts": true}', "hosts=True: must be int"),
        ('{"step": 4, "commit": ["a"], "device": "cpu"}', "commit=['a']: must be str"),
        ('{"step": 4, "commit": "a", "device": "cpu", "ranks": 2}', "hosts=None: must be int"),
        (
            '{"step": 4, "commit": "a", "device": "cpu", "ranks": 2, "hosts": 1, "versions": []}',
            "versions=[]: must be dict",
        ),
    ],
)
def test_a_value_of_another_kind_is_refused(tmp_path: Path, line: str, message: str):
    path = tmp_path / "sessions.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError) as refused:
        read_sessions(tmp_path)
    assert str(refused.value) == f"{path}, step 4: {message}"
