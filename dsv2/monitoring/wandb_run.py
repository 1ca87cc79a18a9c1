"""A run in W&B. W&B must never stop, delay or garble training.

W&B never prompts. If it cannot log in, it goes offline and one line says so. If it fails during a run, one
line says so and metrics are written to metrics.jsonl only.

A resumed run keeps its W&B id and logs `step=` itself. Online, W&B then drops the steps that it already
has. Offline, each session has its own folder `RUN_DIR/wandb/offline-run-TIME-ID`: `wandb leet
RUN_DIR/wandb` shows them all, and `wandb sync RUN_DIR/wandb` uploads them into one run.
"""

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dsv2.config.compose import to_plain
from dsv2.config.schema import Config, WandbMode
from dsv2.monitoring.records import METRICS_FILE
from dsv2.monitoring.wandb_settings import wandb_mode, wandb_project

if TYPE_CHECKING:
    from wandb import Run, Settings  # importing wandb takes 0.8 s, so only the functions below do

_INIT_TIMEOUT_S = 30.0  # an online start that takes longer goes offline
_FINISH_TIMEOUT_S = 20.0  # upload at the end; below the 30 s that torchrun leaves a stopped process


class WandbRun:
    """W&B's run until something fails; then it does nothing."""

    def __init__(self, run: "Run", run_dir: Path) -> None:
        self._run: Run | None = run
        self._run_dir = run_dir
        self.url = run.url if not run.offline else None  # None: offline

    def log(self, scalars: Mapping[str, float], pictures: Mapping[str, np.ndarray], step: int) -> None:
        """Log one step's values and its pictures, uint8 [height, width, 3]."""
        self._try(lambda run: run.log({**scalars, **_images(pictures)}, step=step))

    def alert(self, title: str, text: str) -> None:
        """Have W&B notify the run's owner."""
        self._try(lambda run: run.alert(title=title, text=text))

    def finish(self, exit_code: int) -> None:
        """End the run, waiting at most 20 s for uploads."""
        self._try(lambda run: run.finish(exit_code=exit_code))
        if self._run is not None:
            self._run = None
            _stop_wandb_process()

    def _try(self, action: Callable[["Run"], object]) -> None:
        """Do `action`. If it fails, do without W&B for this session: training must continue."""
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._run = None
            _stop_wandb_process()
            metrics = self._run_dir / METRICS_FILE
            print(
                f"W&B stopped working ({_one_line(error)}); metrics are still written to {metrics}",
                flush=True,
            )


def start_wandb(config: Config, wandb_id: str) -> WandbRun | None:
    """Start a W&B run: online if that is allowed and works, else offline; None if neither works."""
    print("starting W&B", flush=True)  # a login and an upload's start may each take tens of seconds
    import wandb

    logging = config.logging
    run_dir = config.run_dir

    def start(mode: Literal["online", "offline"]) -> WandbRun:
        run = wandb.init(
            project=wandb_project(logging.project, os.environ),
            entity=logging.entity,
            name=config.name,
            config=to_plain(config),
            allow_val_change=True,  # a resumed run may have a new layout
            id=wandb_id,
            resume="allow",
            dir=str(run_dir),
            mode=mode,
            settings=_settings(),
        )
        run.define_metric("*", step_metric="_step")
        return WandbRun(run, run_dir)

    why_offline = "as configured"
    if wandb_mode(logging, os.environ) is WandbMode.auto:
        why_offline = "not logged in"
        try:
            wandb.setup(settings=_settings())  # before the login, which would print
            if wandb.login(prompt=False, verify=True):  # an unreachable server raises within about 10 s
                return start("online")
        except Exception as error:
            why_offline = _one_line(error)
            _stop_wandb_process()  # it holds the id of a run that failed to start: "run ID is in use"
    try:
        run = start("offline")
    except Exception as error:
        _stop_wandb_process()
        print(f"W&B does not start ({_one_line(error)}); metrics go to {run_dir / METRICS_FILE}", flush=True)
        return None
    print(f"W&B is offline ({why_offline})", flush=True)
    return run


def offline_hint(folder: Path) -> str:
    """Return the commands that show and upload the sessions in this folder."""
    command = shlex.quote(wandb_command())
    sessions = shlex.quote(str(folder))
    return f"{command} leet {sessions}   (to upload: {command} sync {sessions})"


def wandb_command() -> str:
    """Return W&B's command as the user can type it: this environment's may not be on the user's PATH."""
    beside = Path(sys.executable).with_name("wandb")
    if not beside.is_file():
        return "wandb"
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)


def _images(pictures: Mapping[str, np.ndarray]) -> dict[str, Any]:
    if not pictures:
        return {}
    import wandb

    return {name: wandb.Image(pixels) for name, pixels in pictures.items()}


def _settings() -> "Settings":
    import wandb

    return wandb.Settings(
        silent=True,  # the few lines worth reading are ours
        console="off",  # the console belongs to the run's log
        disable_code=True,
        disable_git=True,
        init_timeout=_INIT_TIMEOUT_S,
        finish_timeout=_FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
    )


def _stop_wandb_process() -> None:
    """End W&B's helper process now. If its exit hook finds that process dead, it prints a traceback."""
    import wandb

    try:
        wandb.teardown()
    except Exception:  # the process has already ended, which is the goal
        return


def _one_line(error: Exception) -> str:
    """Return the error's type and the first line of its text."""
    first_line = str(error).strip().partition("\n")[0]
    return ": ".join(part for part in (type(error).__name__, first_line) if part)
