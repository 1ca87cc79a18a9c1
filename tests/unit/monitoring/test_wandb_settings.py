"""W&B's own variables count unless the configuration says otherwise."""

import pytest

from dsv2.config.schema import LoggingConfig, WandbMode
from dsv2.monitoring.tracker import open_tracker
from dsv2.monitoring.wandb_settings import wandb_mode, wandb_project
from tests.unit.helpers import compose_config


@pytest.mark.parametrize(
    ("configured", "variable", "mode"),
    [
        ("auto", "offline", "offline"),
        ("auto", "dryrun", "offline"),
        ("auto", "disabled", "disabled"),
        ("auto", "online", "auto"),
        ("auto", None, "auto"),
        ("offline", "disabled", "offline"),
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
    ],
)
def test_mode(configured, variable, mode):
    environment = {} if variable is None else {"WANDB_MODE": variable}
    assert wandb_mode(LoggingConfig(wandb=WandbMode[configured]), environment) is WandbMode[mode]


def test_project():
    assert wandb_project(None, {}) == "dsv2"
    assert wandb_project(None, {"WANDB_PROJECT": "theirs"}) == "theirs"
    assert wandb_project("ours", {"WANDB_PROJECT": "theirs"}) == "ours"
    assert compose_config().logging.project is None, "else the variable would never count"


def test_a_disabled_run_makes_no_folder_of_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = compose_config(f"runs_dir='{tmp_path}'", "name=run")
    with open_tracker(config, wandb_id=None, is_main=True) as tracker:
        tracker.log({"train/loss_lm": 1.0}, step=1)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
