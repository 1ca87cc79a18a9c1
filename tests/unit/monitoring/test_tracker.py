"""The tracker without an account: what is written, and what is read back."""

import math
import re
import time
from pathlib import Path

import numpy as np
import pytest

from dsv2.errors import UserError
from dsv2.monitoring import tracker as tracker_module
from dsv2.monitoring.pictures import heat_map
from dsv2.monitoring.records import read_maps, read_metrics
from dsv2.monitoring.wandb_run import wandb_command
from tests.unit.monitoring.tracking import history, session_process, start

pytestmark = pytest.mark.usefixtures("no_wandb_settings")


def without_times(run_dir: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(run_dir)]


# ---------------------------------------------------------------- metrics.jsonl


def test_every_line_is_on_disk_at_once_with_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker_module.time, "time", iter([1764331200.12549, 1764331201.0]).__next__)
    tracker = start(tmp_path / "run")
    tracker.log({"train/loss_lm": 4.5, "train/tokens": 4096}, step=1)
    tracker.log({"train/loss_lm": np.float32(0.25), "val/bpb": np.array(1.5)}, step=2)
    written = (tmp_path / "run" / "metrics.jsonl").read_text()  # before close
    tracker.close()
    assert written == (
        '{"step": 1, "time": 1764331200.125, "train/loss_lm": 4.5, "train/tokens": 4096}\n'
        '{"step": 2, "time": 1764331201.0, "train/loss_lm": 0.25, "val/bpb": 1.5}\n'
    )
    assert read_metrics(tmp_path / "run") == [
        {"step": 1, "time": 1764331200.125, "train/loss_lm": 4.5, "train/tokens": 4096},
        {"step": 2, "time": 1764331201.0, "train/loss_lm": 0.25, "val/bpb": 1.5},
    ]


def test_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    tracker = start(tmp_path)
    tracker.log({"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 1.0}, step=3)
    tracker.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert (
        re.sub(r'"time": [0-9.]+, ', "", text) == '{"step": 3, "a": null, "b": null, "c": null, "d": 1.0}\n'
    )
    (row,) = read_metrics(tmp_path)
    assert [math.isnan(row[name]) for name in "abcd"] == [True, True, True, False]


def test_disabled_writes_the_file_alone_and_keeps_the_id(tmp_path, capfd):
    tracker = start(tmp_path / "run", wandb_id="kept")
    tracker.log({"x": 1.0, "picture": np.zeros((2, 2, 3), np.uint8)}, step=1)
    tracker.log({"picture": np.zeros((2, 2, 3), np.uint8)}, step=2)  # nothing for the file
    tracker.alert("t", "x")
    assert tracker.wandb_id == "kept"
    assert tracker.dashboard_hint == str(tmp_path / "run" / "metrics.jsonl")
    tracker.close()
    tracker.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    assert without_times(tmp_path / "run") == [{"step": 1, "x": 1.0}]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("mode", ["auto", "offline", "disabled"])
def test_other_ranks_leave_no_trace(tmp_path, capfd, mode):
    tracker = start(tmp_path / "run", mode, wandb_id="kept", is_main=False)
    tracker.log({"x": 1.0}, step=1)
    tracker.alert("t", "x")
    tracker.close()
    assert tracker.wandb_id == "kept"
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


def test_a_torn_last_line_is_skipped_and_cut_by_the_next_session(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 1.0}\n{"step": 2, "x": 2')
    assert read_metrics(tmp_path) == [{"step": 1, "x": 1.0}]
    path.write_text('{"step": 1, "x": 1.0}\n{"step": 2, "x": 2}')  # torn just before the newline
    assert read_metrics(tmp_path) == [{"step": 1, "x": 1.0}]
    tracker = start(tmp_path)
    tracker.log({"x": 22.0}, step=2)
    tracker.close()
    assert path.read_text().startswith('{"step": 1, "x": 1.0}\n{"step": 2, "time": ')
    assert without_times(tmp_path) == [{"step": 1, "x": 1.0}, {"step": 2, "x": 22.0}]


def test_lines_of_one_step_merge_and_the_later_value_wins(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "a": 1.0, "b": 1.0}\n{"step": 1, "b": 2.0, "c": 3.0}\n{"step": 2, "a": 4.0}\n'
    )
    assert read_metrics(tmp_path) == [{"step": 1, "a": 1.0, "b": 2.0, "c": 3.0}, {"step": 2, "a": 4.0}]


def test_a_resumed_session_replaces_what_followed_its_checkpoint(tmp_path):
    first = start(tmp_path)
    for step in range(1, 6):
        first.log({"loss": 10.0 + step}, step=step)
    first.log({"val": 7.0}, step=5)
    first.close()
    second = start(tmp_path)  # the checkpoint was that of step 2; it is killed after step 4
    for step in (3, 4):
        second.log({"loss": 20.0 + step}, step=step)
    second.close()
    assert without_times(tmp_path) == [
        {"step": 1, "loss": 11.0},
        {"step": 2, "loss": 12.0},
        {"step": 3, "loss": 23.0},
        {"step": 4, "loss": 24.0},
    ]


@pytest.mark.parametrize("line", ["{", "[1, 2]", "7", '{"x": 1.0}', '{"step": "one"}'])
def test_a_broken_line_before_the_last_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not a JSON object with a step"):
        read_metrics(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: no such file"):
        read_metrics(tmp_path)


# ---------------------------------------------------------------- maps.jsonl


def test_the_numbers_of_heat_maps_are_kept(tmp_path):
    tracker = start(tmp_path)
    load = np.array([[0.1234, 2.0], [np.nan, 1.0]])
    tracker.log({"x": 1.0}, step=9)
    tracker.log({"x": 2.0, "map/a": load, "map/b": np.array([[1.0]], np.float32)}, step=10)
    written = (tmp_path / "maps.jsonl").read_text()  # before close
    tracker.log({"map/a": load * 2}, step=20)
    tracker.close()
    assert written == '{"step": 10, "map/a": [[0.123, 2.0], [null, 1.0]], "map/b": [[1.0]]}\n'
    assert read_maps(tmp_path) == [
        {"step": 10, "map/a": [[0.123, 2.0], [None, 1.0]], "map/b": [[1.0]]},
        {"step": 20, "map/a": [[0.247, 4.0], [None, 2.0]]},
    ]
    assert [row["x"] for row in read_metrics(tmp_path)] == [1.0, 2.0]
    assert not read_maps(tmp_path / "elsewhere")


def test_a_resumed_session_drops_the_maps_beyond_its_checkpoint(tmp_path):
    """Even before the session has written its own map, and with another interval."""
    first = start(tmp_path)
    for step in (10, 20, 30):
        first.log({"map": np.full((1, 1), float(step))}, step=step)
    first.close()
    second = start(tmp_path)  # from the checkpoint of step 15
    second.log({"x": 1.0}, step=16)
    assert [row["step"] for row in read_maps(tmp_path)] == [10]
    second.log({"x": 1.0}, step=17)
    second.log({"map": np.full((1, 1), 7.0)}, step=25)
    second.close()
    assert read_maps(tmp_path) == [{"step": 10, "map": [[10.0]]}, {"step": 25, "map": [[7.0]]}]
    assert len((tmp_path / "maps.jsonl").read_text().splitlines()) == 5  # one line marks the session


# ---------------------------------------------------------------- pictures


def test_heat_map_colours_and_cells():
    blue, white, red, black = [33, 102, 172], [247, 247, 247], [178, 24, 43], [0, 0, 0]
    picture = heat_map(np.array([[0.0, 1.0, 3.0], [9.0, np.nan, 0.5]]))
    assert picture.dtype == np.uint8
    assert picture.shape == (16, 24, 3)
    assert picture[::8, ::8].tolist() == [[blue, white, red], [red, black, [140, 174, 210]]]
    assert (picture[:8, :8] == blue).all()  # the whole cell
    assert (picture[8:, 8:16] == black).all()


def test_a_finished_picture_stays_and_another_array_is_refused(tmp_path):
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert heat_map(picture) is picture
    tracker = start(tmp_path)
    with pytest.raises(ValueError, match=r"got float32 \[2, 4, 3\]"):
        tracker.log({"map": picture.astype(np.float32)}, step=1)
    with pytest.raises(ValueError, match=r"got float64 \[5\]"):
        tracker.log({"map": np.zeros(5)}, step=1)
    tracker.close()


# ---------------------------------------------------------------- W&B offline


def test_two_offline_sessions_of_one_run_are_read_back(tmp_path, capfd):
    run_dir = tmp_path / "run"
    first = start(run_dir, "auto")
    wandb_id = first.wandb_id
    assert wandb_id is not None
    first.log({"train/loss_lm": 5.5, "bad": float("nan")}, step=1)
    first.log({"train/loss_lm": 5.0, "map/load": np.ones((2, 3))}, step=2)
    first.log({"val/loss": 5.25}, step=2)
    first.log({"train/loss_lm": 4.5}, step=3)
    first.close()
    (one,) = run_dir.glob("wandb/offline-run-*")
    time.sleep(1.0)  # W&B names a session's folder by the second
    second = start(run_dir, "offline", wandb_id)  # from a checkpoint of step 2
    second.log({"train/loss_lm": 4.25}, step=3)
    second.log({"train/loss_lm": 4.0}, step=4)
    hint = second.dashboard_hint
    second.close(exit_code=1)
    sessions = set(run_dir.glob("wandb/offline-run-*"))
    (two,) = sessions - {one}
    assert {path.name.rsplit("-", 1)[1] for path in sessions} == {wandb_id} == {second.wandb_id}

    kept = history(one)
    assert {step: item.get("train/loss_lm") for step, item in kept.items()} == {1: 5.5, 2: 5.0, 3: 4.5}
    assert kept[2]["val/loss"] == 5.25  # one row per step, however many calls
    assert kept[1]["bad"] == "NaN"
    assert (kept[2]["map/load.width"], kept[2]["map/load.height"]) == (24, 16)
    assert (one / "files" / kept[2]["map/load.path"]).is_file()
    assert {step: item["train/loss_lm"] for step, item in history(two).items()} == {3: 4.25, 4: 4.0}
    assert [row["train/loss_lm"] for row in read_metrics(run_dir)] == [5.5, 5.0, 4.25, 4.0]

    wandb = wandb_command()
    assert hint == f"{wandb} leet {run_dir}/wandb   (to upload: {wandb} sync {run_dir}/wandb)"
    printed, errors = capfd.readouterr()
    offline = [f"starting W&B\nW&B is offline ({why})\n" for why in ("not logged in", "as configured")]
    assert printed == "".join(offline)
    assert errors == ""


def test_training_goes_on_when_the_wandb_process_dies(tmp_path):
    done = session_process(tmp_path / "run", "kill")
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert lines[:3] == ["starting W&B", "W&B is offline (not logged in)", "killed"]
    # One warning and the hint; W&B notices at the next line logged, or only when it is closed.
    (warning,) = [line for line in lines[3:] if line.startswith("W&B stopped working (")]
    assert warning.endswith(f"metrics are still written to {tmp_path / 'run' / 'metrics.jsonl'}")
    assert len(lines) == 5
    assert [row["train/loss_lm"] for row in read_metrics(tmp_path / "run")] == [5.0, 3.0, 2.0]
