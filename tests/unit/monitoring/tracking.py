"""Sessions of the tracker, in this process and in a separate one."""

import os
import subprocess
import sys
from pathlib import Path

from dsv2.config.schema import Config, LoggingConfig, WandbMode
from dsv2.monitoring.tracker import Tracker, open_tracker
from tests.unit.helpers import wandb_history

ROOT = Path(__file__).parents[3]
KEY = "0123456789" * 4  # W&B looks at a key's length before it asks the server

# A session in a separate process, to see all that it prints and its exit code.
SESSION = """
import os, signal, sys, time
from pathlib import Path
import dsv2.monitoring.wandb_run
from dsv2.config.schema import Config
from dsv2.monitoring.tracker import open_tracker
dsv2.monitoring.wandb_run._INIT_TIMEOUT_S = 2.0
run_dir = Path(sys.argv[1])
tracker = open_tracker(Config(name=run_dir.name, runs_dir=str(run_dir.parent)), wandb_id="id7", is_main=True)
tracker.log({"train/loss_lm": 5.0}, step=1)
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
    tracker.log({"train/loss_lm": 5.0 - step}, step=step)
tracker.alert("title", "text")
print(tracker.dashboard_hint)
tracker.close()
"""


def start(
    run_dir: Path, mode: str = "disabled", wandb_id: str | None = None, is_main: bool = True
) -> Tracker:
    logging = LoggingConfig(wandb=WandbMode[mode])
    config = Config(name=run_dir.name, runs_dir=str(run_dir.parent), logging=logging)
    return open_tracker(config, wandb_id=wandb_id, is_main=is_main)


def history(session: Path) -> dict[int, dict]:
    """step -> the metrics that `wandb leet inspect --json` finds in a session's folder."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(session)]
    return wandb_history(
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    )


def session_process(run_dir: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", SESSION, str(run_dir), *args],
        env={**os.environ, **env, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
