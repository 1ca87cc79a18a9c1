"""The tracker: what is written, what is read back, and that W&B can never hold a run up.

No network: W&B either works offline, or talks to a small server on the loopback interface.
"""

import http.server
import json
import math
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import dsv2.tracker
from dsv2.config import LoggingConfig, WandbMode
from dsv2.errors import UserError
from dsv2.tracker import Tracker, heat_map, open_tracker, read_metrics

ROOT = Path(__file__).parents[2]
KEY = "0123456789" * 4  # W&B looks at a key's length before it asks the server

# A session in a process of its own, with all that it prints and its exit code.
SESSION = """
import os, signal, sys, time
from pathlib import Path
import dsv2.tracker
from dsv2.config import LoggingConfig, WandbMode
dsv2.tracker._INIT_TIMEOUT_S = 2.0
run_dir = Path(sys.argv[1])
tracker = dsv2.tracker.open_tracker(LoggingConfig(), run_dir, "r", {}, "id7", True)
tracker.log({"train/loss": 5.0}, step=1)
if sys.argv[2:] == ["kill"]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\\0")
        except OSError:
            continue
        if words[0].endswith(b"wandb-core") and str(os.getpid()).encode() in words:
            os.kill(int(process.name), signal.SIGKILL)
            while (process / "cmdline").exists() and (process / "cmdline").read_bytes():
                time.sleep(0.01)  # until it is gone, or a zombie
            print("killed")
for step in (2, 3):
    tracker.log({"train/loss": 5.0 - step}, step=step)
tracker.alert("title", "text")
print(tracker.dashboard_hint)
tracker.close()
"""


@pytest.fixture(autouse=True)
def _no_account(tmp_path, monkeypatch):
    """No key, no settings and no server from outside; no W&B process left behind."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: refused at once
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def start(
    run_dir: Path, mode: str = "disabled", wandb_id: str | None = None, is_main: bool = True
) -> Tracker:
    return open_tracker(LoggingConfig(wandb=WandbMode[mode]), run_dir, "name", {"lr": 0.1}, wandb_id, is_main)


def history(session: Path) -> dict[int, dict]:
    """step -> the metrics that `wandb leet inspect --json` finds in a session's folder."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(session)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    records = [json.loads(line) for line in printed.splitlines()]
    return {r["history"]["step"]["num"]: r["history"]["item"] for r in records if r["type"] == "history"}


def session_process(run_dir: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", SESSION, str(run_dir), *args],
        env={**os.environ, **env, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


# ---------------------------------------------------------------- metrics.jsonl


def test_every_line_is_on_disk_at_once(tmp_path):
    tracker = start(tmp_path / "run")
    tracker.log({"train/loss": 4.5, "train/tokens": 4096}, step=1)
    tracker.log({"train/loss": np.float32(0.25), "val/bpb": np.array(1.5)}, step=2)
    written = (tmp_path / "run" / "metrics.jsonl").read_text()  # before close
    tracker.close()
    assert written == (
        '{"step": 1, "train/loss": 4.5, "train/tokens": 4096}\n'
        '{"step": 2, "train/loss": 0.25, "val/bpb": 1.5}\n'
    )
    assert read_metrics(tmp_path / "run") == [
        {"step": 1, "train/loss": 4.5, "train/tokens": 4096},
        {"step": 2, "train/loss": 0.25, "val/bpb": 1.5},
    ]


def test_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    tracker = start(tmp_path)
    tracker.log({"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 1.0}, step=3)
    tracker.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 3, "a": null, "b": null, "c": null, "d": 1.0}\n'
    (row,) = read_metrics(tmp_path)
    assert [math.isnan(row[name]) for name in "abcd"] == [True, True, True, False]


def test_disabled_writes_the_file_alone_and_keeps_the_id(tmp_path, capfd):
    tracker = start(tmp_path / "run", wandb_id="kept")
    tracker.log({"x": 1.0, "map": np.zeros((2, 2))}, step=1)
    tracker.log({"map": np.zeros((2, 2))}, step=2)  # nothing for the file
    tracker.alert("t", "x")
    assert tracker.wandb_id == "kept"
    assert tracker.dashboard_hint == str(tmp_path / "run" / "metrics.jsonl")
    tracker.close()
    tracker.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    assert read_metrics(tmp_path / "run") == [{"step": 1, "x": 1.0}]
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
    assert path.read_text() == '{"step": 1, "x": 1.0}\n{"step": 2, "x": 22.0}\n'


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
    assert read_metrics(tmp_path) == [
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
    first.log({"train/loss": 5.5, "bad": float("nan")}, step=1)
    first.log({"train/loss": 5.0, "map/load": np.ones((2, 3))}, step=2)
    first.log({"val/loss": 5.25}, step=2)
    first.log({"train/loss": 4.5}, step=3)
    first.close()
    (one,) = run_dir.glob("wandb/offline-run-*")
    time.sleep(1.0)  # W&B names a session's folder by the second
    second = start(run_dir, "offline", wandb_id)  # from a checkpoint of step 2
    second.log({"train/loss": 4.25}, step=3)
    second.log({"train/loss": 4.0}, step=4)
    hint = second.dashboard_hint
    second.close(exit_code=1)
    sessions = set(run_dir.glob("wandb/offline-run-*"))
    (two,) = sessions - {one}
    assert {path.name.rsplit("-", 1)[1] for path in sessions} == {wandb_id} == {second.wandb_id}

    kept = history(one)
    assert {step: item.get("train/loss") for step, item in kept.items()} == {1: 5.5, 2: 5.0, 3: 4.5}
    assert kept[2]["val/loss"] == 5.25  # one row a step, however many calls
    assert kept[1]["bad"] == "NaN"
    assert (kept[2]["map/load.width"], kept[2]["map/load.height"]) == (24, 16)
    assert (one / "files" / kept[2]["map/load.path"]).is_file()
    assert {step: item["train/loss"] for step, item in history(two).items()} == {3: 4.25, 4: 4.0}
    assert [row["train/loss"] for row in read_metrics(run_dir)] == [5.5, 5.0, 4.25, 4.0]

    wandb = dsv2.tracker._wandb_command()
    assert hint == f"{wandb} leet {run_dir}/wandb   (to upload: {wandb} sync {run_dir}/wandb)"
    printed, errors = capfd.readouterr()
    assert printed == "W&B is offline (not logged in)\nW&B is offline (as configured)\n"
    assert errors == ""


def test_without_a_key_a_terminal_is_not_asked(tmp_path):
    terminal, process_side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SESSION, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdin=process_side,
        stdout=process_side,
        stderr=process_side,
        start_new_session=True,
    )
    os.close(process_side)
    try:
        assert process.wait(timeout=60) == 0  # a prompt would wait for ever
    finally:
        process.kill()
        process.wait()
    printed = os.read(terminal, 100_000).decode().splitlines()
    os.close(terminal)
    assert printed[0] == "W&B is offline (not logged in)"
    assert len(printed) == 2  # and the hint
    assert [row["train/loss"] for row in read_metrics(tmp_path / "run")] == [5.0, 3.0, 2.0]


def test_training_goes_on_when_the_wandb_process_dies(tmp_path):
    done = session_process(tmp_path / "run", "kill")
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert lines[:2] == ["W&B is offline (not logged in)", "killed"]
    assert lines[2].startswith("W&B stopped working (")
    assert lines[2].endswith(f"metrics go on in {tmp_path / 'run' / 'metrics.jsonl'}")
    assert len(lines) == 4  # one warning, and the hint
    assert [row["train/loss"] for row in read_metrics(tmp_path / "run")] == [5.0, 3.0, 2.0]


# ---------------------------------------------------------------- W&B online, against a server of our own


class _Wandb(http.server.BaseHTTPRequestHandler):
    """As much of W&B's server as a run needs; `server.mode` says what goes wrong."""

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.bodies.append((self.path, body))
        request = json.loads(body) if self.path == "/graphql" else {}
        code, answer = self._answer(request.get("query", ""), request.get("variables") or {})
        data = json.dumps(answer).encode()
        try:
            self.send_response(code)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client gave up
            return

    do_GET = do_PUT = do_POST

    def _answer(self, query, variables):
        mode = self.server.mode
        if "viewer" in query:
            viewer = {"id": "V", "entity": "team", "username": "me", "flags": "{}", "teams": {"edges": []}}
            return (401, {}) if mode == "wrong key" else (200, {"data": {"viewer": viewer}})
        if "upsertBucket" in query:
            if mode == "hangs":
                self.server.released.wait(30)
            if mode == "forbidden":
                return 403, {}
            name = variables.get("name") or "?"
            project = {"id": "P", "name": "dsv2", "entity": {"id": "E", "name": "team"}}
            bucket = {"id": "B", "name": name, "displayName": name, "config": "{}", "project": project}
            return 200, {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "createRunFiles" in query:
            url = f"http://127.0.0.1:{self.server.server_port}/upload"
            files = [{"name": name, "uploadUrl": url} for name in variables["files"]]
            return 200, {"data": {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}}
        return 200, {"data": {}} if query else {}


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Wandb)
    server.mode, server.bodies, server.released = "", [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("wrong key", "returned error 401"),
        ("forbidden", "CommError"),
        ("hangs", "Timed out initializing run"),
    ],
)
def test_a_server_that_refuses_or_hangs_means_offline(tmp_path, server, mode, reason):
    server.mode = mode
    url = f"http://127.0.0.1:{server.server_port}"
    done = session_process(tmp_path / "run", WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert lines[0].startswith("W&B is offline (")
    assert reason in lines[0]
    assert len(lines) == 2  # and the hint
    (session,) = (tmp_path / "run").glob("wandb/offline-run-*-id7")
    assert {step: item["train/loss"] for step, item in history(session).items()} == {1: 5.0, 2: 3.0, 3: 2.0}


def test_a_malformed_key_means_offline(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    tracker = start(tmp_path, "auto")
    tracker.close()
    printed, errors = capfd.readouterr()
    assert printed.startswith("W&B is offline (WANDB_API_KEY invalid: ")
    assert (printed.count("\n"), errors) == (1, "")


def test_online_uploads_under_the_given_id_and_shows_the_url(tmp_path, server):
    url = f"http://127.0.0.1:{server.server_port}"
    done = session_process(tmp_path / "run", WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{url}/team/dsv2/runs/id7\n"
    rows = {}
    for path, body in server.bodies:
        if path == "/files/team/dsv2/id7/file_stream":
            for line in json.loads(body)["files"].get("wandb-history.jsonl", {}).get("content", []):
                row = json.loads(line)
                rows[row["_step"]] = row["train/loss"]
    assert rows == {1: 5.0, 2: 3.0, 3: 2.0}
    assert [row["train/loss"] for row in read_metrics(tmp_path / "run")] == [5.0, 3.0, 2.0]
