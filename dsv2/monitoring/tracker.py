"""Metrics of a run: W&B for people, `RUN_DIR/metrics.jsonl` for programs and in case W&B fails.

Every scalar goes to both. metrics.jsonl has one JSON object per line, `{"step": 12, "time": 1764331200.125,
"train/loss_lm": 4.1}`. `time` is when the line was written, in Unix seconds; W&B keeps its own `_timestamp`.
Each line is written at once, because W&B loses up to 32 KiB of records when a process is killed. W&B gets
heat maps as pictures. Their numbers go to `RUN_DIR/maps.jsonl`, with three decimals, as `{"step": 100,
"map/dev_load": [[1.02, 0.98], ...]}`. Each session starts that file with a line that holds only its first
step. Readers then discard maps that an earlier session wrote after the checkpoint this one resumed from.
"""

import math
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data.reading import is_file
from dsv2.config.schema import Config, WandbMode
from dsv2.monitoring.pictures import heat_map
from dsv2.monitoring.records import MAPS_FILE, METRICS_FILE, RecordWriter
from dsv2.monitoring.wandb_run import WandbRun, offline_hint, start_wandb
from dsv2.monitoring.wandb_settings import wandb_mode


class Tracker:
    """Where a run's metrics go. `open_tracker` makes it. On ranks other than 0 it does nothing.

    As a context it closes itself, whatever ends the run.
    """

    def __init__(self, run_dir: Path, is_main: bool, run: WandbRun | None, wandb_id: str | None) -> None:
        self.wandb_id = wandb_id  # checkpoints keep it; give it to open_tracker on resume
        self._run_dir = run_dir
        self._lines = RecordWriter(run_dir / METRICS_FILE) if is_main else None
        self._maps: RecordWriter | None = None  # opened with the first heat map
        self._session_is_marked = False  # in maps.jsonl
        self._run = run

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(exit_code=0 if error is None else 1)

    def log(self, metrics: Mapping[str, float | np.ndarray], step: int) -> None:
        """Record metrics of one step. Steps go backwards only after `rewound`.

        Args:
            metrics: scalars, and images as in `heat_map`; finished pictures go to W&B only.
            step: counted from 1.

        Raises:
            ValueError: an array is neither a heat map nor a picture.
        """
        if self._lines is None:
            return
        scalars: dict[str, float] = {}
        images: dict[str, np.ndarray] = {}
        maps: dict[str, list[list[float | None]]] = {}
        for name, value in metrics.items():
            if isinstance(value, np.ndarray) and value.ndim > 0:
                images[name] = heat_map(value)
                if value.ndim == 2:
                    maps[name] = [[_finite(round(float(cell), 3)) for cell in row] for row in value]
            else:
                scalars[name] = _number(value)
        if scalars:
            finite = {name: _finite(value) for name, value in scalars.items()}
            self._lines.append({"step": step, "time": round(time.time(), 3), **finite})
        self._record_maps(maps, step)
        if self._run is not None:
            self._run.log(scalars, images, step)

    def rewound(self) -> None:
        """Expect smaller steps next: the run went back. The files' readers then discard what came after."""
        self._session_is_marked = False

    def alert(self, title: str, text: str) -> None:
        """Have W&B notify the run's owner, by e-mail or Slack as the owner has set it up."""
        if self._run is not None:
            self._run.alert(title, text)

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run, waiting at most 20 s for uploads, and close the files; idempotent."""
        if self._run is not None:
            self._run.finish(exit_code)
        for writer in (self._lines, self._maps):
            if writer is not None:
                writer.close()
        self._lines = None
        self._maps = None

    @property
    def dashboard_hint(self) -> str:
        """Return how to see the run: its URL online, else commands for a terminal dashboard and an upload."""
        if self._run is not None and self._run.url is not None:
            return self._run.url
        folder = self._run_dir / "wandb"
        return offline_hint(folder) if folder.is_dir() else str(self._run_dir / METRICS_FILE)

    def _record_maps(self, maps: dict[str, list[list[float | None]]], step: int) -> None:
        path = self._run_dir / MAPS_FILE
        if self._maps is None and (maps or is_file(path)):
            self._maps = RecordWriter(path)
        if self._maps is not None and (maps or not self._session_is_marked):
            self._maps.append({"step": step, **maps})
        self._session_is_marked = True


def open_tracker(config: Config, *, wandb_id: str | None, is_main: bool) -> Tracker:
    """Start recording a session of a run.

    Args:
        config: of the run. metrics.jsonl in its folder is appended to; W&B's files go to `wandb` beside it.
        wandb_id: the id of the run that is resumed, None for a new run.
        is_main: True on rank 0; on other ranks the tracker does nothing.
    """
    run_dir = config.run_dir
    if not is_main:
        return Tracker(run_dir, is_main=False, run=None, wandb_id=wandb_id)
    run_dir.mkdir(parents=True, exist_ok=True)
    run = None
    if wandb_mode(config.logging, os.environ) is not WandbMode.disabled:
        wandb_id = wandb_id or secrets.token_hex(4)
        run = start_wandb(config, wandb_id)
    return Tracker(run_dir, is_main=True, run=run, wandb_id=wandb_id)


def _number(value: Any) -> float:
    """Return a Python number: counts stay whole, everything else (NumPy, torch) becomes a float."""
    return value if type(value) is int else float(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
