"""The tracker and W&B's server: it can never hold a run up.

No network: W&B talks to a small server on the loopback interface, or to none.
"""

import http.server
import json
import os
import pty
import subprocess
import sys
import threading

import pytest

from dsv2.monitoring.records import read_metrics
from tests.unit.monitoring.tracking import KEY, ROOT, SESSION, history, session_process, start

pytestmark = pytest.mark.usefixtures("no_wandb_settings")


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
    assert printed[:2] == ["starting W&B", "W&B is offline (not logged in)"]
    assert len(printed) == 3  # and the hint
    assert [row["train/loss_lm"] for row in read_metrics(tmp_path / "run")] == [5.0, 3.0, 2.0]


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
    assert lines[1].startswith("W&B is offline (")
    assert reason in lines[1]
    assert len(lines) == 3  # and the hint
    (session,) = (tmp_path / "run").glob("wandb/offline-run-*-id7")
    losses = {step: item["train/loss_lm"] for step, item in history(session).items()}
    assert losses == {1: 5.0, 2: 3.0, 3: 2.0}


def test_a_malformed_key_means_offline(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    tracker = start(tmp_path, "auto")
    tracker.close()
    printed, errors = capfd.readouterr()
    assert printed.startswith("starting W&B\nW&B is offline (AuthenticationError: WANDB_API_KEY invalid: ")
    assert (printed.count("\n"), errors) == (2, "")


def test_online_uploads_under_the_given_id_and_shows_the_url(tmp_path, server):
    url = f"http://127.0.0.1:{server.server_port}"
    done = session_process(tmp_path / "run", WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"starting W&B\n{url}/team/dsv2/runs/id7\n"
    rows = {}
    for path, body in server.bodies:
        if path == "/files/team/dsv2/id7/file_stream":
            for line in json.loads(body)["files"].get("wandb-history.jsonl", {}).get("content", []):
                row = json.loads(line)
                rows[row["_step"]] = row["train/loss_lm"]
    assert rows == {1: 5.0, 2: 3.0, 3: 2.0}
    assert [row["train/loss_lm"] for row in read_metrics(tmp_path / "run")] == [5.0, 3.0, 2.0]
    requests = [json.loads(body) for path, body in server.bodies if path == "/graphql"]
    (alert,) = [r["variables"] for r in requests if "notifyScriptableRunAlert" in r["query"]]
    assert (alert["runName"], alert["title"], alert["text"]) == ("id7", "title", "text")
