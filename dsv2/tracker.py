"""Metrics of a run: W&B for people, `RUN_DIR/metrics.jsonl` for programs and for the day W&B fails.

Every scalar goes to both. metrics.jsonl has one JSON object a line, `{"step": 12, "train/loss": 4.1}`,
written out line by line, because W&B loses up to 32 KiB of records when a process is killed. JSON knows no
NaN or infinity: both are `null` in the file and NaN when read back (W&B keeps them as they are).

W&B must never stop, hold up or garble a training run. It never prompts; it goes offline with one line where
it cannot log in; and if it fails in the middle of a run, one line says so and metrics.jsonl goes on alone.

A resumed run keeps its W&B id and logs `step=` itself. Online, W&B then drops the steps it already has.
Offline, each session is a folder `RUN_DIR/wandb/offline-run-TIME-ID` of its own: `wandb leet RUN_DIR/wandb`
shows them all, and `wandb sync RUN_DIR/wandb` uploads them into one run.
"""

import contextlib
import io
import json
import math
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dsv2.config import LoggingConfig, WandbMode
from dsv2.errors import UserError

if TYPE_CHECKING:
    from wandb import Run, Settings  # importing wandb takes 0.8 s, so only open_tracker does

METRICS_FILE = "metrics.jsonl"

_INIT_TIMEOUT_S = 30.0  # an online start that takes longer goes offline
_FINISH_TIMEOUT_S = 20.0  # upload at the end; below the 30 s that torchrun leaves a stopped process
_CELL_PIXELS = 8  # side of a heat map's cell


class Tracker:
    """Where a run's metrics go. Made by `open_tracker`; without files (other ranks) it does nothing."""

    def __init__(
        self, run_dir: Path, lines: io.FileIO | None, run: "Run | None", wandb_id: str | None
    ) -> None:
        self.wandb_id = wandb_id  # keep it in checkpoints and give it to open_tracker on resume
        self._run_dir = run_dir
        self._lines = lines
        self._run = run
        self._warned = False
        self._online_url = run.url if run is not None and not run.offline else None

    def log(self, metrics: Mapping[str, float | np.ndarray], step: int) -> None:
        """Record metrics of one step; steps never go backwards within a session.

        Args:
            metrics: scalars, and images as in `heat_map`; images go to W&B only.

        Raises:
            ValueError: An array that is neither a heat map nor a picture.
        """
        if self._lines is None:
            return
        scalars: dict[str, float] = {}
        images: dict[str, np.ndarray] = {}
        for name, value in metrics.items():
            if isinstance(value, np.ndarray) and value.ndim > 0:
                images[name] = heat_map(value)
            else:
                scalars[name] = _number(value)
        if scalars:
            finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
            self._write_line(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._try_wandb(lambda run: run.log({**scalars, **_wandb_images(images)}, step=step))

    def alert(self, title: str, text: str) -> None:
        """Have W&B notify the run's owner (e-mail or Slack, as they set it up)."""
        self._try_wandb(lambda run: run.alert(title=title, text=text))

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run, waiting at most 20 s for uploads, and close the file; idempotent."""
        self._try_wandb(lambda run: run.finish(exit_code=exit_code))
        if self._run is not None:
            self._run = None
            _stop_wandb_process()
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    @property
    def dashboard_hint(self) -> str:
        """How to see the run: its URL online, else commands for a terminal dashboard and for an upload."""
        if self._online_url is not None:
            return self._online_url
        folder = self._run_dir / "wandb"
        if not folder.is_dir():
            return str(self._run_dir / METRICS_FILE)
        wandb, where = shlex.quote(_wandb_command()), shlex.quote(str(folder))
        return f"{wandb} leet {where}   (to upload: {wandb} sync {where})"

    def _write_line(self, line: str) -> None:
        """Write it whole, or lose it with one warning a session: a full disk must not end a run."""
        assert self._lines is not None
        data, before = line.encode(), os.fstat(self._lines.fileno()).st_size
        try:
            if self._lines.write(data) == len(data):
                return
            problem = "the disk is full"
        except OSError as error:
            problem = str(error)
        with contextlib.suppress(OSError):  # half a line would spoil the next one
            self._lines.truncate(before)
        if not self._warned:
            print(f"warning: {METRICS_FILE} could not be written: {problem}", flush=True)
        self._warned = True

    def _try_wandb(self, action: Callable[["Run"], object]) -> None:
        """Do it, or give W&B up for this session: whatever goes wrong there, training goes on."""
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._run = None
            _stop_wandb_process()
            print(
                f"W&B stopped working ({_one_line(error)}); metrics go on in {self._run_dir / METRICS_FILE}",
                flush=True,
            )


def open_tracker(
    logging: LoggingConfig,
    run_dir: Path,
    run_name: str,
    run_config: dict[str, Any],
    wandb_id: str | None,
    is_main: bool,
) -> Tracker:
    """Start recording a session of a run.

    Args:
        run_dir: metrics.jsonl is appended to, W&B's files go to `run_dir/wandb`.
        run_name: the run's name in W&B.
        run_config: the configuration, as plain values, shown by W&B.
        wandb_id: the id of the run that is resumed, None for a new run.
        is_main: True on rank 0; on other ranks the tracker does nothing.
    """
    if not is_main:
        return Tracker(run_dir, lines=None, run=None, wandb_id=wandb_id)
    run_dir.mkdir(parents=True, exist_ok=True)
    run = None
    if logging.wandb is not WandbMode.disabled:
        wandb_id = wandb_id or secrets.token_hex(4)
        run = _start_wandb(logging, run_dir, run_name, run_config, wandb_id)
    metrics_file = run_dir / METRICS_FILE
    _drop_torn_line(metrics_file)
    lines = io.FileIO(metrics_file, "a")  # no buffer: what a line could not be written from must not linger
    return Tracker(run_dir, lines, run, wandb_id)


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The run's scalars, `{"step": 12, "train/loss": 4.1, ...}`, one dict a step, sorted by step.

    A step smaller than the one before it starts a resumed session: what was recorded from that step on
    belongs to a past that no checkpoint holds any more, and is dropped. Several lines of one step are merged,
    later values winning. `null` becomes NaN. A torn last line, left by a killed process, is skipped.

    Raises:
        UserError: No such file, or a line before the last is not a JSON object with a step.
    """
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; is {run_dir} the directory of a run?")
    # A line counts only with its newline: a torn one may be valid JSON by accident.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    rows: dict[int, dict[str, float]] = {}
    last_step: int | None = None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}, line {number}: not a JSON object with a step: {line[:80]!r}") from error
        if last_step is not None and step < last_step:
            rows = {kept: row for kept, row in rows.items() if kept < step}
        values = {name: math.nan if value is None else value for name, value in record.items()}
        rows.setdefault(step, {}).update(values)
        last_step = step
    return [rows[step] for step in sorted(rows)]


def heat_map(values: np.ndarray) -> np.ndarray:
    """A picture [height, width, 3] of uint8.

    Args:
        values: [rows, columns], drawn as cells from blue (0) over white (1, the balanced load) to
            red (3 and more), NaN black; or a finished picture [height, width, 3] of uint8, returned as it is.

    Raises:
        ValueError: Another shape or type.
    """
    if values.ndim == 3 and values.shape[2] == 3 and values.dtype == np.uint8:
        return values
    if values.ndim != 2:
        raise ValueError(
            f"an image is [rows, columns] or uint8 [height, width, 3], "
            f"got {values.dtype} {list(values.shape)}"
        )
    cells = values.astype(np.float64)
    stops = [0.0, 1.0, 3.0]
    channels = [
        np.interp(cells, stops, colours) for colours in ([33, 247, 178], [102, 247, 24], [172, 247, 43])
    ]
    pixels = np.nan_to_num(np.stack(channels, axis=-1), nan=0.0).round().astype(np.uint8)
    return pixels.repeat(_CELL_PIXELS, axis=0).repeat(_CELL_PIXELS, axis=1)


def _number(value: Any) -> float:
    """A Python number: counts stay whole, everything else (NumPy, torch) becomes a float."""
    return value if type(value) is int else float(value)


def _wandb_images(pictures: Mapping[str, np.ndarray]) -> dict[str, Any]:
    if not pictures:
        return {}
    import wandb

    return {name: wandb.Image(pixels) for name, pixels in pictures.items()}


def _drop_torn_line(path: Path) -> None:
    """Cut the half line that a killed process may have left, so that the next line starts on its own."""
    if path.is_file():
        written = path.read_bytes()
        os.truncate(path, written.rfind(b"\n") + 1)


def _start_wandb(
    logging: LoggingConfig, run_dir: Path, run_name: str, run_config: dict[str, Any], wandb_id: str
) -> "Run | None":
    """A W&B run: online if that is allowed and works, else offline; None if not even that works."""
    import wandb

    def start(mode: Literal["online", "offline"]) -> "Run":
        run = wandb.init(
            project=logging.project,
            entity=logging.entity,
            name=run_name,
            config=run_config,
            allow_val_change=True,  # a resumed run may have a new layout
            id=wandb_id,
            resume="allow",
            dir=str(run_dir),
            mode=mode,
            settings=_wandb_settings(),
        )
        run.define_metric("*", step_metric="_step")
        return run

    why_offline = "as configured"
    if logging.wandb is WandbMode.auto:
        why_offline = "not logged in"
        try:
            wandb.setup(settings=_wandb_settings())  # before the login, which talks otherwise
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


def _wandb_settings() -> "Settings":
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
    """End W&B's helper process now; left to its exit hook, a dead one prints a traceback."""
    import wandb

    try:
        wandb.teardown()
    except Exception:  # it is gone already, which is what we want
        return


def _one_line(error: Exception) -> str:
    """The error's first line, or its type where it has no text."""
    text = str(error).strip()
    return text.splitlines()[0] if text and text != "<no message>" else type(error).__name__


def _wandb_command() -> str:
    """W&B's command as the user can type it: the environment's own, which need not be on their PATH."""
    beside = Path(sys.executable).with_name("wandb")
    if not beside.is_file():
        return "wandb"
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)
