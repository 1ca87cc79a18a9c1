"""Metrics of a run: W&B for people, `RUN_DIR/metrics.jsonl` for programs and for the day W&B fails.

Every scalar goes to both. metrics.jsonl has one JSON object a line, `{"step": 12, "train/loss": 4.1}`,
written out line by line, because W&B loses up to 32 KiB of records when a process is killed. JSON knows no
NaN or infinity: both are `null` in the file and NaN when read back (W&B keeps them as they are).
W&B gets heat maps as pictures; their numbers go to `RUN_DIR/maps.jsonl`, with three decimals, as
`{"step": 100, "map/dev_load": [[1.02, 0.98], ...]}`. Every session begins there with a line of its first step
alone, so that maps from beyond the checkpoint it starts from are known to be gone.

W&B must never stop, hold up or garble a training run. It never prompts; it goes offline with one line where
it cannot log in; and if it fails in the middle of a run, one line says so and metrics.jsonl goes on alone.

A resumed run keeps its W&B id and logs `step=` itself. Online, W&B then drops the steps it already has.
Offline, each session is a folder `RUN_DIR/wandb/offline-run-TIME-ID` of its own: `wandb leet RUN_DIR/wandb`
shows them all, and `wandb sync RUN_DIR/wandb` uploads them into one run.
"""

import math
import secrets
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dsv2.config.schema import LoggingConfig, WandbMode
from dsv2.monitoring.records import RecordWriter, read_records

if TYPE_CHECKING:
    from wandb import Run, Settings  # importing wandb takes 0.8 s, so only open_tracker does

METRICS_FILE = "metrics.jsonl"
MAPS_FILE = "maps.jsonl"
# A heat map's colours: blue for no load, white for the balanced one (1), red for 3 and more.
HEAT_STOPS = [0.0, 1.0, 3.0]
HEAT_COLOURS = [[33, 102, 172], [247, 247, 247], [178, 24, 43]]

_INIT_TIMEOUT_S = 30.0  # an online start that takes longer goes offline
_FINISH_TIMEOUT_S = 20.0  # upload at the end; below the 30 s that torchrun leaves a stopped process
_CELL_PIXELS = 8  # side of a heat map's cell


class Tracker:
    """Where a run's metrics go. Made by `open_tracker`; without files (other ranks) it does nothing."""

    def __init__(self, run_dir: Path, is_main: bool, run: "Run | None", wandb_id: str | None) -> None:
        self.wandb_id = wandb_id  # keep it in checkpoints and give it to open_tracker on resume
        self._run_dir = run_dir
        self._lines = RecordWriter(run_dir / METRICS_FILE) if is_main else None
        self._maps: RecordWriter | None = None  # from the first heat map on
        self._began = False
        self._run = run
        self._online_url = run.url if run is not None and not run.offline else None

    def log(self, metrics: Mapping[str, float | np.ndarray], step: int) -> None:
        """Record metrics of one step; steps never go backwards within a session.

        Args:
            metrics: scalars, and images as in `heat_map`; finished pictures go to W&B only.

        Raises:
            ValueError: An array that is neither a heat map nor a picture.
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
            self._lines.append({"step": step, **finite})
        self._record_maps(maps, step)
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
        for writer in (self._lines, self._maps):
            if writer is not None:
                writer.close()
        self._lines = self._maps = None

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

    def _record_maps(self, maps: dict[str, list[list[float | None]]], step: int) -> None:
        path = self._run_dir / MAPS_FILE
        if self._maps is None and (maps or path.is_file()):
            self._maps = RecordWriter(path)
        if self._maps is not None and (maps or not self._began):
            self._maps.append({"step": step, **maps})
        self._began = True

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
        return Tracker(run_dir, is_main=False, run=None, wandb_id=wandb_id)
    run_dir.mkdir(parents=True, exist_ok=True)
    run = None
    if logging.wandb is not WandbMode.disabled:
        wandb_id = wandb_id or secrets.token_hex(4)
        run = _start_wandb(logging, run_dir, run_name, run_config, wandb_id)
    return Tracker(run_dir, is_main=True, run=run, wandb_id=wandb_id)


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The run's scalars, `{"step": 12, "train/loss": 4.1, ...}`, one dict a step, sorted by step.

    `null` becomes NaN; resumed sessions and torn lines are as `read_records` says.

    Raises:
        UserError: No such file, or a line before the last is not a JSON object with a step.
    """
    rows = read_records(run_dir / METRICS_FILE)
    return [{name: math.nan if v is None else v for name, v in row.items()} for row in rows]


def read_maps(run_dir: Path) -> list[dict[str, Any]]:
    """The run's heat maps, `{"step": 100, "map/expert_load": rows, ...}`, sorted by step; [] if it has none.

    Raises:
        UserError: A line before the last is not a JSON object with a step.
    """
    path = run_dir / MAPS_FILE
    return [row for row in read_records(path) if len(row) > 1] if path.is_file() else []


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
    channels = [np.interp(cells, HEAT_STOPS, channel) for channel in zip(*HEAT_COLOURS, strict=True)]
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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


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
