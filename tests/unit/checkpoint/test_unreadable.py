"""A file system that refuses for a while: what cannot be read is neither missing nor damaged."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv2.checkpoint import files, tensors
from dsv2.checkpoint.files import check, damaged_file, find_checkpoint, free_name, last_good
from dsv2.checkpoint.state import RunState, Snapshot
from dsv2.checkpoint.store import CheckpointStore
from dsv2.errors import Unreadable, UserError
from dsv2.parallel.mesh import ALONE, Mesh
from tests.unit.checkpoint.test_files import MODEL, make, store

REFUSALS = [errno.EIO, errno.EACCES, errno.ESTALE]
ONE = Mesh(torch.device("cpu"))


@pytest.fixture(params=REFUSALS, ids=lambda code: errno.errorcode[code])
def refuse(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the system calls on one path fail."""

    def start(path: Path) -> None:
        def refusing(call: Any) -> Any:
            def wrapped(target: Any, *args: Any, **kwargs: Any) -> Any:
                if os.fspath(target) == str(path):
                    raise OSError(request.param, os.strerror(request.param), str(path))
                return call(target, *args, **kwargs)

            return wrapped

        for name in ("scandir", "listdir"):
            monkeypatch.setattr(os, name, refusing(getattr(os, name)))
        monkeypatch.setattr(Path, "open", refusing(Path.open))

    return start


def test_a_folder_that_cannot_be_listed_is_no_fresh_start(tmp_path, refuse):
    make(tmp_path / "checkpoints", 20)
    refuse(tmp_path / "checkpoints")
    for resume in ("auto", "never"):
        with pytest.raises(Unreadable, match=rf"^{tmp_path}/checkpoints: cannot be read \(.*same command"):
            store(tmp_path / "checkpoints").find(resume)
    with pytest.raises(Unreadable):
        find_checkpoint(tmp_path)
    assert "cannot be read" in last_good(tmp_path / "checkpoints"), "a diverged run still says so"


def test_a_state_that_cannot_be_read_is_not_passed_over(tmp_path, refuse):
    """An older checkpoint would be continued, and its next save would replace the newer one."""
    make(tmp_path, 10)
    newest = make(tmp_path, 20)
    refuse(newest / "state.json")
    with pytest.raises(Unreadable, match=r"step-00000020/state.json: cannot be read"):
        store(tmp_path).find("auto")


def test_a_file_that_cannot_be_read_is_not_damaged(tmp_path, refuse):
    make(tmp_path, 10)
    newest = make(tmp_path, 20)
    checkpoints = store(tmp_path)
    found = checkpoints.find("auto")
    assert found is not None
    refuse(newest / "__0_0.distcp")
    with pytest.raises(Unreadable, match=r"__0_0.distcp: cannot be read"):
        damaged_file(newest, ["__0_0.distcp"], {})
    with pytest.raises(Unreadable, match=r"__0_0.distcp: cannot be read"):
        checkpoints.load(found, [], ONE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]


def snapshot(step: int) -> Snapshot:
    return Snapshot([], RunState(step=step), step, torch.get_rng_state())


def test_a_save_deletes_nothing_while_the_folder_cannot_be_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "write", lambda shards, folder, group: (folder / ".metadata").touch())
    checkpoints = CheckpointStore(tmp_path, keep=1, settings={"model": MODEL})
    checkpoints.save(snapshot(1), ALONE)

    def refuse(folder: Path) -> list[str]:
        raise Unreadable(str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(files, "names_in", refuse)
        checkpoints.save(snapshot(2), ALONE)
    assert len(list(tmp_path.iterdir())) == 2
    checkpoints.save(snapshot(3), ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_the_second_damaged_checkpoint_of_a_step_is_set_aside_too(tmp_path):
    assert free_name(tmp_path / "step-7.damaged").name == "step-7.damaged"
    for taken in ("step-7.damaged", "step-7.damaged1"):
        (tmp_path / taken).mkdir()
    assert free_name(tmp_path / "step-7.damaged").name == "step-7.damaged2"
    assert files.newest_first(tmp_path) == []


BAD = {
    "outside": ({"files": {"../secret": 3}}, "names a file outside: ../secret"),
    "sum outside": ({"crc32": {"/etc/passwd": 3}}, "names a file outside: /etc/passwd"),
    "newer run": (
        {"run": {"step": 3, "tokens": 0, "epoch": 2}},
        "unknown field 'run.epoch'; use a newer dsv2",
    ),
    "step": ({"run": {"step": "3", "tokens": 0}}, "has run="),
    "run": ({"run": [3]}, "has run="),
    "config": ({"config": "model"}, "has config='model'"),
    "adam_step": ({"adam_step": None}, "has adam_step=None"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_state_of_another_shape_is_one_message(tmp_path, name):
    changes, message = BAD[name]
    path = make(tmp_path, 3)
    content = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(content | changes))
    with pytest.raises(UserError) as refusal:
        check(path)
    assert f"checkpoint {path}: state.json " in str(refusal.value)
    assert message in str(refusal.value)


def test_a_newer_versions_field_of_the_model_is_named(tmp_path):
    make(tmp_path, 3, MODEL | {"n_predict": 2})
    with pytest.raises(UserError, match=r"configuration of checkpoint .* does not fit .*model.n_predict: "):
        store(tmp_path).find("auto")
