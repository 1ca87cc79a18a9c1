"""The run whose page the tests of this folder write."""

import json
from pathlib import Path

import pytest

from dsv2.config.compose import to_yaml
from tests.unit.helpers import compose_config
from tests.unit.monitoring.report.runs import log_steps


def session(torch: str, step: int) -> str:
    """A line of sessions.jsonl, whose texts would break a careless page."""
    machine = {"host": "n<b>", "processes": 2, "gpus": ["H200<b>, 139.8 GiB"] * 2}
    machine |= {"cpu": "EPYC", "memory_gib": 128.0}
    record = {
        "step": step,
        "commit": "</script><b>1234",
        "device": "H200<b>",
        "ranks": 2,
        "hosts": 1,
        "command": ["train.py", "name=<b>"],
        "changed": ["a<i>.py"],
        "diff": "diff-2.patch",
        "versions": {"torch": torch},
        "machines": [machine],
    }
    return json.dumps(record) + "\n"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run that was resumed once, whose name and prompt would break a careless page."""
    folder = tmp_path / "run"
    log_steps(folder, range(1, 76))
    log_steps(folder, range(51, 101), offset=0.5)
    config = compose_config("name='a<b>'", "eval.sample_prompt='</script><b>&'")
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "config.0.yaml").write_text("seed: 7\n")
    (folder / "sessions.jsonl").write_text(session("2.10", step=0) + session("2.11<b>", step=50))
    (folder / "status.json").write_text('{"state": "finished", "step": 100, "total_steps": 100}\n')
    return folder
