"""What is taken for a checkpoint, and which one a run goes on from; nothing here is trained."""

import json
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsv2.checkpoint.files import FORMAT, check, checksum, complete_checkpoints, damaged_file
from dsv2.checkpoint.store import CheckpointStore
from dsv2.errors import UserError

MODEL = {"hidden_size": 8, "balance": {"alpha_expert": 0.1}}


def make(folder: Path, step: int, model: dict | None = None) -> Path:
    """A folder with all that makes a checkpoint whole, and 10 bytes of data."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"0123456789")
    content = {
        "format": FORMAT,
        "run": {"step": step, "tokens": 0, "data": None, "wandb_id": None},
        "adam_step": step,
        "config": {"model": model or MODEL},
        "files": {"__0_0.distcp": 10},
    }
    (path / "state.json").write_text(json.dumps(content))
    return path


def store(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder, 2, {"model": MODEL})


def cut_data(path: Path) -> None:
    (path / "__0_0.distcp").write_bytes(b"0123")


def lose_data(path: Path) -> None:
    (path / "__0_0.distcp").unlink()


def lose_state(path: Path) -> None:
    (path / "state.json").unlink()


def tear_state(path: Path) -> None:
    state = path / "state.json"
    state.write_text(state.read_text()[:-20])


def foreign_state(path: Path) -> None:
    (path / "state.json").write_text(json.dumps({"step": 3, "model": "something else"}))


def list_state(path: Path) -> None:
    (path / "state.json").write_text("[1, 2]")


def no_files(path: Path) -> None:
    content = json.loads((path / "state.json").read_text())
    del content["files"]
    (path / "state.json").write_text(json.dumps(content))


DAMAGE = {
    cut_data: "__0_0.distcp has 4 bytes of 10",
    lose_data: "__0_0.distcp is missing",
    lose_state: "no state.json",
    tear_state: "state.json cannot be read",
    foreign_state: "not of the format",
    list_state: "not of the format",
    no_files: "every file is missing",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_is_refused_by_path_and_passed_over_by_auto(tmp_path, damage):
    make(tmp_path, 3)
    newest = make(tmp_path, 7)
    damage(newest)
    for call in (lambda: check(newest), lambda: store(tmp_path / "another").find(str(newest))):
        with pytest.raises(UserError, match=DAMAGE[damage]) as refusal:
            call()
        assert str(newest) in str(refusal.value)
    found = store(tmp_path).find("auto")
    assert found is not None
    assert (found.path.name, found.state.step) == ("step-00000003", 3)
    assert len(found.warnings) == 1
    assert DAMAGE[damage] in found.warnings[0]


def test_load_falls_back_past_an_older_one_that_is_torn(tmp_path, monkeypatch):
    """The newest turns out damaged when its bytes are read, the next lies there torn: the third is loaded."""
    oldest, torn, newest = (make(tmp_path, step) for step in (3, 5, 7))
    tear_state(torn)
    problems = {newest: "its checksum differs", torn: "state.json cannot be read"}
    monkeypatch.setattr(CheckpointStore, "_damage", lambda self, path, mesh: problems.get(path))
    monkeypatch.setattr(CheckpointStore, "_read", lambda self, path, shards, mesh: check(path))
    checkpoints: Any = store(tmp_path)
    found = checkpoints.find("auto")
    loaded = checkpoints.load(found, [], SimpleNamespace(is_main=True))
    assert (loaded.path, loaded.state.step) == (oldest, 3)
    assert [text.split(";")[0] for text in loaded.warnings] == list(problems.values())
    assert found.warnings == [], "what was found stays as it was found"


def test_all_damaged_is_no_fresh_start(tmp_path):
    cut_data(make(tmp_path, 3))
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole .*4 bytes of 10.*move the folder"):
        store(tmp_path).find("auto")


def test_a_runs_folder_is_its_newest_whole_checkpoint(tmp_path):
    other = tmp_path / "other" / "checkpoints"
    older = make(other, 2)
    cut_data(make(other, 4))
    found = store(tmp_path / "new").find(str(tmp_path / "other"))
    assert found is not None
    assert found.path == older


def test_missing(tmp_path):
    with pytest.raises(UserError, match=r"^resume=\S+-00000009: there is no such folder; must be a"):
        store(tmp_path).find(str(tmp_path / "step-00000009"))


def test_nothing_there_is_a_fresh_start(tmp_path):
    assert store(tmp_path / "new").find("auto") is None
    assert store(tmp_path / "new").find("never") is None


def test_a_save_that_was_cut_short_is_not_there(tmp_path):
    make(tmp_path, 9).rename(tmp_path / "step-00000009.partial")
    assert store(tmp_path).find("auto") is None
    assert store(tmp_path).find("never") is None


def test_never_does_not_touch_an_old_run(tmp_path):
    make(tmp_path, 3)
    with pytest.raises(UserError, match=r"resume=never: .*step-00000003; use resume=auto .*name=NAME"):
        store(tmp_path).find("never")


def test_branching_off_an_older_checkpoint_needs_a_name(tmp_path):
    older, newest = make(tmp_path, 3), make(tmp_path, 7)
    with pytest.raises(UserError, match=r"newer step-00000007, which would be overwritten.*name=NAME"):
        store(tmp_path).find(str(older))
    found = store(tmp_path).find(str(newest))
    assert found is not None
    assert found.path == newest


def test_own_checkpoints_come_before_the_given_one(tmp_path):
    given, own = make(tmp_path / "one", 30), make(tmp_path / "other", 7)
    found = store(tmp_path / "other").find(str(given))
    assert found is not None
    assert found.path == own
    found = store(tmp_path / "third").find(str(given))
    assert found is not None
    assert found.path == given


def test_another_model_is_refused_but_not_another_balance_recipe(tmp_path):
    make(tmp_path, 3, {"hidden_size": 16, "balance": {"alpha_expert": 0.1}})
    with pytest.raises(UserError, match=r"model.hidden_size=8: the checkpoint .* was saved with 16"):
        store(tmp_path).find("auto")
    make(tmp_path / "b", 3, {"hidden_size": 8, "balance": {"alpha_expert": 0.5}})
    assert store(tmp_path / "b").find("auto") is not None


YARN = {"factor": 2.0}


def longer(folder: Path, new_stage: bool) -> CheckpointStore:
    model = MODEL | {"rope_scaling": YARN, "max_position_embeddings": 128}
    return CheckpointStore(folder, 2, {"model": model, "new_stage": new_stage})


def test_a_new_stage_starts_at_step_0_and_may_scale_rope(tmp_path):
    given = make(tmp_path / "short", 30, MODEL | {"rope_scaling": None, "max_position_embeddings": 64})
    found = longer(tmp_path / "long", new_stage=True).find(str(given))
    assert found is not None
    assert (found.path, found.state.step) == (given, 0)
    with pytest.raises(UserError, match=r"model.rope_scaling=.*was saved with None.*new_stage=true"):
        longer(tmp_path / "long", new_stage=False).find(str(given))


def test_a_stage_goes_on_from_its_own_checkpoints(tmp_path):
    given = make(tmp_path / "short", 30, MODEL | {"rope_scaling": None})
    own = make(tmp_path / "long", 7, MODEL | {"rope_scaling": YARN})
    found = longer(tmp_path / "long", new_stage=True).find(str(given))
    assert found is not None
    assert (found.path, found.state.step) == (own, 7)


def test_a_stage_does_not_begin_within_the_run_it_continues(tmp_path):
    """The same name would mix two schedules in one folder."""
    own = make(tmp_path, 30, MODEL | {"rope_scaling": None})
    with pytest.raises(UserError, match=r"model.rope_scaling=.*another run with name=NAME"):
        longer(tmp_path, new_stage=True).find(str(own))


def test_a_field_that_the_checkpoint_is_older_than_had_its_default(tmp_path):
    make(tmp_path, 3)
    assert CheckpointStore(tmp_path, 2, {"model": MODEL | {"rope_scaling": None}}).find("auto") is not None
    with pytest.raises(UserError, match=r"model.rope_theta=5.0: the checkpoint .* was saved with 10000.0"):
        CheckpointStore(tmp_path, 2, {"model": MODEL | {"rope_theta": 5.0}}).find("auto")


def test_checksum_is_crc_32_of_the_whole_file(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"123456789")
    assert checksum(file) == 0xCBF43926, "the check value in every description of CRC-32"
    content = bytes(range(256)) * (1 << 17)  # 32 MiB, read in blocks of 16
    file.write_bytes(content)
    assert checksum(file) == zlib.crc32(content)


def test_damaged_file_names_the_first_that_differs(tmp_path):
    sums = {}
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode() * 10)
        sums[name] = checksum(tmp_path / name)
    assert damaged_file(tmp_path, ["a", "b", "c"], sums) is None
    (tmp_path / "b").write_bytes(b"bbbbbcbbbb")
    (tmp_path / "c").unlink()
    problem = "b does not hold what was written (its checksum differs)"
    assert damaged_file(tmp_path, ["a", "b", "c"], sums) == problem
    assert damaged_file(tmp_path, ["a"], sums) is None, "only those asked for are read"
    assert damaged_file(tmp_path, ["c"], sums) == "c cannot be read (No such file or directory)"
    assert damaged_file(tmp_path, ["a"], {}) is not None, "without a checksum nothing vouches for it"


def test_one_that_was_set_aside_is_no_checkpoint(tmp_path):
    older = make(tmp_path, 3)
    make(tmp_path, 7).rename(tmp_path / "step-00000007.damaged")
    assert complete_checkpoints(tmp_path) == [older]
    found = store(tmp_path).find("auto")
    assert found is not None
    assert (found.path, found.warnings) == (older, [])
