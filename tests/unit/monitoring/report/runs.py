"""A run's files and its page, for the tests of the report."""

import base64
import hashlib
import html.parser
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv2.config.schema import Config, LoggingConfig, WandbMode
from dsv2.monitoring.panels import SECTIONS
from dsv2.monitoring.tracker import Tracker, open_tracker
from tests.unit.helpers import run_verb

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH"
)

LAYERS, EXPERTS, GROUPS = 3, 16, 4  # of model=debug
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


def tracker_of(run_dir: Path) -> Tracker:
    logging = LoggingConfig(wandb=WandbMode.disabled)
    config = Config(name=run_dir.name, runs_dir=str(run_dir.parent), logging=logging)
    return open_tracker(config, wandb_id=None, is_main=True)


def log_steps(run_dir: Path, steps: range, offset: float = 0.0, leave_out: tuple[str, ...] = ()) -> None:
    """A session as the monitor logs it: windows of 5 steps, maps every 10, an evaluation every 20."""
    tracker = tracker_of(run_dir)
    rng = np.random.default_rng(0)
    for step in steps:
        metrics: dict[str, Any] = {}
        for section in SECTIONS:
            for name in [name for chart in section.charts for name in chart.names]:
                every = {"moe": 5, "vio": 5, "dead": 5, "drop": 5, "dev": 5, "comm": 5, "map": 10, "val": 20}
                if name in leave_out or step % every.get(name.split("/")[0], 1):
                    continue
                value = 10.0 / step + offset
                if name.endswith("/R*"):
                    metrics |= {f"{name[:-1]}{rank}": value * (rank + 1) for rank in (0, 1)}
                elif name.endswith("/L*"):
                    metrics |= {f"{name[:-2]}L{layer:02d}": value * layer for layer in (1, 2, 3)}
                elif name.startswith("map/"):
                    width = EXPERTS if name == "map/expert_load" else GROUPS
                    metrics[name] = rng.random((LAYERS, width)) * 3
                else:
                    metrics[name] = value
        tracker.log({**metrics, "train/tokens": step * 2048}, step=step)
    tracker.close()


def write_page(run_dir: Path) -> str:
    assert run_verb("report", run_dir) == 0
    return (run_dir / "report.html").read_text()


class Parsed(html.parser.HTMLParser):
    """Elements, the text of each section, and the content of the script with the data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self.data = ""
        self._section = ""
        self._in_data = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "section":
            self._section = attributes["id"] or ""
            self.sections[self._section] = ""
        self._in_data = tag == "script" and attributes.get("id") == "data"

    def handle_endtag(self, tag):
        self._in_data = False
        if tag == "section":
            self._section = ""

    def handle_data(self, data):
        if self._in_data:
            self.data += data
        elif self._section:
            self.sections[self._section] += data


def in_a_browser(text: str, folder: Path, visitor: str = "", dark: bool = False) -> Parsed:
    """Return the page as it is after its script and then the visitor's; the page's file goes to `folder`."""
    page = folder / "visited.html"
    # The page's policy stands, with the visitor's script as the only further one.
    allowed = f"'sha256-{base64.b64encode(hashlib.sha256(visitor.encode()).digest()).decode()}'"
    text = text.replace("script-src ", f"script-src {allowed} ", 1)
    page.write_text(text.replace("</body>", f"<script>{visitor}</script></body>"))
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Parsed(done.stdout)
