"""The run whose page the tests of this folder write."""

from pathlib import Path

import pytest

from dsv2.config.compose import to_yaml
from tests.unit.helpers import compose_config
from tests.unit.monitoring.report.runs import log_steps


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run that was resumed once, whose name and prompt would break a careless page."""
    folder = tmp_path / "run"
    log_steps(folder, range(1, 76))
    log_steps(folder, range(51, 101), offset=0.5)
    config = compose_config("name='a<b>'", "eval.sample_prompt='</script><b>&'")
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "config.0.yaml").write_text("seed: 7\n")
    (folder / "status.json").write_text('{"state": "finished", "step": 100, "total_steps": 100}\n')
    return folder
