"""The dashboard: every metric in it once, offline; and the view that W&B is sent.

No network: where W&B must answer, a small server on the loopback interface does.
"""

import http.server
import json
import os
import re
import subprocess
import sys
import threading

import pytest

from dsv2.monitoring.metrics.producers import METRICS
from dsv2.monitoring.panels import SECTIONS

KEY = "0123456789" * 4  # W&B looks at a key's length before it asks the server


def names_in(panel: dict) -> list[str]:
    """The metrics a panel of the spec shows."""
    config = panel["config"]
    if config.get("useMetricRegex"):
        found = re.fullmatch(r"\^(\w+/[LR])\[0-9\]\+\$", config["metricRegex"])
        assert found, config["metricRegex"]
        return [f"{found[1]}*"]
    return config["mediaKeys"] if panel["viewType"] == "Media Browser" else config["metrics"]


def dashboard(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-m", "dsv2", "dashboard", *arguments],
        env=clean | {"WANDB_ERROR_REPORTING": "false"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_metric_has_one_place():
    laid_out = [name for section in SECTIONS for chart in section.charts for name in chart.names]
    assert sorted(laid_out) == sorted(METRICS)
    assert len(laid_out) > 35


def test_the_spec_is_written_offline(tmp_path):
    file = tmp_path / "spec.json"
    # Whatever asks for the network fails at once, and the account is nobody's.
    done = dashboard("--spec", str(file), HOME=str(tmp_path), WANDB_BASE_URL="http://127.0.0.1:9")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{file}\n", "")
    sections = json.loads(file.read_text())["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == ["Training", "Balance", "Routing maps", "Performance"]
    shown = [name for section in sections for panel in section["panels"] for name in names_in(panel)]
    assert sorted(shown) == sorted(METRICS)
    titles = [panel["config"]["chartTitle"] for panel in sections[1]["panels"]]
    assert len(set(titles)) == len(titles)
    assert {title.split(": ")[0] for title in titles} == {"Expert", "Device", "Communication"}
    assert {panel["viewType"] for panel in sections[2]["panels"]} == {"Media Browser"}


def test_a_file_that_cannot_be_written(tmp_path):
    done = dashboard("--spec", str(tmp_path / "no" / "spec.json"))
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == f"error: --spec {tmp_path}/no/spec.json: cannot be written (No such file or directory)\n"
    )


def test_not_logged_in_is_one_message(tmp_path):
    done = dashboard(HOME=str(tmp_path), WANDB_BASE_URL="http://127.0.0.1:9")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: W&B: not logged in; run `wandb login` first, or write the view with --spec FILE, which needs "
        "no account\n"
    )


class _Wandb(http.server.BaseHTTPRequestHandler):
    """As much of W&B's server as saving a view needs; `server.saved` gets what was sent."""

    def log_message(self, *args):
        pass

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
        code, answer = self._answer(request.get("query", ""), request.get("variables") or {})
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self, query, variables):
        if "upsertView" in query:
            self.server.saved.append(variables)
            if self.server.refuses:
                return 200, {"errors": [{"message": "no such project"}]}
            return 200, {"data": {"upsertView": {"view": {"id": "V1", "name": "nw-abc-v"}, "inserted": True}}}
        viewer = {"id": "V", "entity": "team", "username": "me", "flags": "{}", "teams": {"edges": []}}
        return 200, {"data": {"viewer": viewer, "serverInfo": {}}}


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Wandb)
    server.saved, server.refuses = [], False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_logged_in_the_view_is_saved_in_the_project(tmp_path, server):
    url = f"http://127.0.0.1:{server.server_port}"
    done = dashboard("--project", "p", HOME=str(tmp_path), WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{url}/team/p?nw=abc\n"
    (sent,) = server.saved
    assert (sent["entityName"], sent["projectName"], sent["displayName"]) == ("team", "p", "dsv2")
    sections = json.loads(sent["spec"])["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [section.title for section in SECTIONS]


def test_a_refusal_is_one_message(tmp_path, server):
    server.refuses = True
    url = f"http://127.0.0.1:{server.server_port}"
    done = dashboard("--entity", "e", HOME=str(tmp_path), WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --entity e --project dsv2: W&B did not save the view (")
    assert "no such project" in done.stderr
    assert done.stderr.count("\n") == 1
