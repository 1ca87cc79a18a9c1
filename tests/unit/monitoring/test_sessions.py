"""sessions.jsonl: which code and machines computed a run, session by session."""

import json
from pathlib import Path

import pytest
import torch

from dsv2.errors import UserError
from dsv2.monitoring.sessions import ROOT, commit, read_sessions, record_session
from dsv2.parallel.mesh import Mesh
from dsv2.parallel.plan import ParallelPlan
from tests.unit.helpers import REPO


@pytest.fixture
def mesh() -> Mesh:
    """Three ranks on two machines."""
    mesh = Mesh(torch.device("cpu"))
    mesh.plan = ParallelPlan(world=3)
    mesh.hosts = ["a", "a", "b"]
    return mesh


def test_a_session_says_what_computed_it(tmp_path, mesh):
    record_session(tmp_path, mesh, step=0)
    (line,) = (tmp_path / "sessions.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 0, "commit": commit(), "device": "cpu", "ranks": 3, "hosts": 2}
    assert read_sessions(tmp_path) == [json.loads(line)]


def test_a_session_whose_steps_are_lost_is_left_out(tmp_path, mesh):
    """Sessions began after the steps 0, 40, 80; the last one went back to step 40."""
    for step in (0, 40, 80):
        record_session(tmp_path, mesh, step)
    mesh.hosts = ["c", "c", "c"]
    record_session(tmp_path, mesh, step=40)
    assert [(session["step"], session["hosts"]) for session in read_sessions(tmp_path)] == [(0, 2), (40, 1)]


def test_an_older_run_has_no_sessions(tmp_path):
    assert read_sessions(tmp_path) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 4, "commit": "a", "device": "cpu", "ranks": "2", "hosts": 1}', "ranks='2': must be int"),
        ('{"step": 4, "commit": "a", "device": "cpu", "ranks": 2, "hosts": true}', "hosts=True: must be int"),
        ('{"step": 4, "commit": ["a"], "device": "cpu"}', "commit=['a']: must be str"),
        ('{"step": 4, "commit": "a", "device": "cpu", "ranks": 2}', "hosts=None: must be int"),
    ],
)
def test_a_value_of_another_kind_is_refused(tmp_path: Path, line: str, message: str):
    path = tmp_path / "sessions.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError) as refused:
        read_sessions(tmp_path)
    assert str(refused.value) == f"{path}, step 4: {message}"


def test_the_commit_is_this_repositorys():
    assert ROOT == REPO
    if (REPO / ".git").exists():
        assert commit().removesuffix("-dirty").isalnum()
