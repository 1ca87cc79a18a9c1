"""What the monitor reports of steps, with a second rank that mirrors the first."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.config import DataConfig
from dsv2.checkpoint.state import Loaded, RunState, Saved
from dsv2.config.schema import Config, LoggingConfig, OptimConfig, WandbMode
from dsv2.errors import Diverged, Unreadable, UserError
from dsv2.moe.balance import BalanceLosses
from dsv2.moe.stats import RoutingStats
from dsv2.monitoring.metrics.routing import routing_values
from dsv2.monitoring.monitor import Monitor
from dsv2.monitoring.records import read_metrics
from dsv2.monitoring.status import mark_failed, read_status, write_status
from dsv2.monitoring.tracker import Tracker, open_tracker
from dsv2.parallel.mesh import Mesh, MeshDim
from dsv2.training.evaluate import Evaluation
from dsv2.training.results import StepResult
from dsv2.training.schedule import StepPlan, plan_steps
from tests.unit.checkpoint.test_files import make as make_checkpoint
from tests.unit.helpers import tiny_config

CONFIG = Config(
    name="monitored",
    model=tiny_config(),
    data=DataConfig(path="nowhere", sequence_length=10),
    optim=OptimConfig(total_tokens=280, batch_size=4),  # 7 steps
    logging=LoggingConfig(wandb=WandbMode.disabled, every=3, maps_every=3),
)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The other rank has the same statistics of experts and groups in reverse order."""
    return tensor + (tensor.flip(-1) if tensor.ndim == 2 else tensor)


class Mirrored(MeshDim):
    """A rank with a second one beside it."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return sum_over_ranks(x)


ONE = Mesh(torch.device("cpu"), world=Mirrored())


class Recorder(Tracker):
    """A tracker that writes nothing."""

    def __init__(self) -> None:
        super().__init__(Path("nowhere"), is_main=False, run=None, wandb_id="w")
        self.alerts: list[tuple[str, str]] = []
        self.exit_codes: list[int] = []

    def log(self, metrics: dict[str, Any], step: int) -> None:
        pass

    def alert(self, title: str, text: str) -> None:
        self.alerts.append((title, text))

    def close(self, exit_code: int = 0) -> None:
        self.exit_codes.append(exit_code)


def result(stats: RoutingStats | None = None, loss: float = 2.0, grad_norm: float = 1.0) -> StepResult:
    balance = BalanceLosses(torch.ones(2), torch.ones(2), torch.ones(2))
    return StepResult(
        loss=loss,
        lm_loss=1.5,
        balance=balance,
        grad_norm=grad_norm,
        stats=stats or stats_of(0),
        wait_ms=0.0,
        work_ms=0.0,
        data_s=0.0,
        seconds=0.0,
    )


def stats_of(step: int) -> RoutingStats:
    """Another load at every step: 2 MoE layers, 12 experts, 4 groups."""
    generator = torch.Generator().manual_seed(step)
    load_E = torch.randint(1, 30, (2, 12), generator=generator).double()
    return RoutingStats(
        tokens=load_E.sum(dim=-1) / 3,
        load_E=load_E,
        dropped_E=(load_E / 3).floor(),
        sent_G=torch.randint(10, 40, (2, 4), generator=generator).double(),
        token_entropy=torch.rand(2, generator=generator).double(),
        top1=torch.rand(2, generator=generator).double(),
        rows_out=torch.zeros(2, dtype=torch.float64),
        rows_in=torch.zeros(2, dtype=torch.float64),
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / CONFIG.name
    folder.mkdir()
    return folder


@contextmanager
def monitor(
    run_dir: Path,
    state: RunState | None = None,
    *,
    config: Config = CONFIG,
    loaded: Loaded | None = None,
    tracker: Tracker | None = None,
) -> Iterator[Monitor]:
    config = replace(config, runs_dir=str(run_dir.parent))
    state = state or RunState()
    with (
        tracker or open_tracker(config, wandb_id=None, is_main=True) as opened,
        Monitor(config, ONE, opened, state, loaded) as watch,
    ):
        yield watch


def failing_session(run_dir: Path, error: BaseException, config: Config = CONFIG) -> str:
    """End a session of a run with all its steps by an error; return status.json as it was before the end."""
    during = []

    def session() -> None:
        with monitor(run_dir, RunState(step=7, tokens=280), config=config):
            during.append((run_dir / "status.json").read_text())
            raise error

    with pytest.raises(type(error)):
        session()
    return during[0]


def feed(watch: Monitor, results: list[StepResult]) -> None:
    for plan, outcome in zip(plan_steps(CONFIG.optim, 10), results, strict=False):
        watch.step(plan, outcome)


def test_each_window_has_its_own_steps_and_the_last_one_what_is_left(run_dir):
    with monitor(run_dir) as watch:
        feed(watch, [result(stats_of(step)) for step in range(7)])
    rows = {int(row["step"]): row for row in read_metrics(run_dir)}
    assert sorted(rows) == list(range(1, 8))
    assert [step for step in rows if "moe/max_vio" in rows[step]] == [3, 6, 7]
    for end, steps in ((3, (0, 1, 2)), (6, (3, 4, 5)), (7, (6,))):
        parts = [stats_of(step) for step in steps]
        sums = [torch.stack(tensors).sum(dim=0) for tensors in zip(*parts, strict=True)]
        total = RoutingStats(*map(sum_over_ranks, sums))
        want = routing_values(total, CONFIG.model)
        assert {name: rows[end][name] for name in want} == pytest.approx(want, rel=1e-12)


def test_the_consoles_loss_is_that_of_an_evaluation_without_balance_losses(run_dir, capsys):
    with monitor(run_dir) as watch:
        feed(watch, [result(loss=2.0)])  # its cross-entropy is 1.5
        watch.evaluation(1, Evaluation(1.25, 0.5))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines if line.startswith(("step 1", "eval 1"))] == [
        "loss 1.500",
        "loss 1.250",
    ]
    (row,) = read_metrics(run_dir)
    assert (row["train/loss_lm"], row["train/loss_total"], row["val/loss"]) == (1.5, 2.0, 1.25)


@pytest.mark.parametrize(
    ("loss", "grad_norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (2.0, float("nan")), (2.0, -1.0)]
)
def test_divergence_alerts_and_is_a_failure(run_dir, loss, grad_norm):
    tracker = Recorder()
    with pytest.raises(Diverged) as caught, monitor(run_dir, tracker=tracker) as watch:
        feed(watch, [result(), result(loss=loss, grad_norm=grad_norm), result()])
    assert str(caught.value).startswith(
        f"step 2: total loss {loss}, gradient norm {grad_norm}; this step is not"
    )
    assert tracker.alerts == [("monitored diverged", str(caught.value))]
    assert tracker.exit_codes == [1]
    assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"


def test_alerts_go_to_the_console_and_to_the_tracker(run_dir, capsys):
    """At the second bad window; all tokens of the first layer go to three experts there."""
    tracker = Recorder()
    load_E = torch.zeros(2, 12).double()
    load_E[0, :3] = 40.0
    load_E[1] = 10.0
    collapsed = stats_of(0)._replace(load_E=load_E)
    logging = replace(CONFIG.logging, alert_windows=2, alert_max_vio=2.5, alert_dead=0.5)
    with monitor(run_dir, config=replace(CONFIG, logging=logging), tracker=tracker) as watch:
        feed(watch, [result(collapsed) for _ in range(7)])
    # Over both ranks, the second one in reverse: 6 of 12 experts with 40 per step, a mean of 20.
    assert tracker.alerts == []
    logging = replace(logging, alert_max_vio=0.9)
    with monitor(run_dir, config=replace(CONFIG, logging=logging), tracker=tracker) as watch:
        feed(watch, [result(collapsed) for _ in range(7)])
    text = "step 6: moe/max_vio_max is 1.00, over 0.90 for 2 windows in a row"
    assert tracker.alerts == [("monitored: routing collapse", text)]
    assert f"alert: routing collapse, {text}\n" in capsys.readouterr().out


def test_other_errors_and_good_ends_do_not_alert(run_dir):
    tracker = Recorder()
    with pytest.raises(OSError, match="lost"), monitor(run_dir, tracker=tracker):
        raise OSError("lost")
    with monitor(run_dir, RunState(step=2, tokens=80), tracker=tracker) as watch:
        watch.step(StepPlan(step=2, tokens=80, tokens_after=120, batch_size=4, lr=1.0), result())
    assert (tracker.alerts, tracker.exit_codes) == ([], [1, 0])
    status = json.loads((run_dir / "status.json").read_text())
    assert status == {"state": "stopped", "step": 3, "total_steps": 7}


def test_a_finished_run_stays_finished_whatever_happens_to_another_evaluation(run_dir):
    with monitor(run_dir) as watch:
        feed(watch, [result() for _ in range(7)])
    names = ("config.yaml", "status.json", "sessions.jsonl")
    kept = {name: (run_dir / name).read_text() for name in names}
    assert '"finished"' in kept["status.json"]
    other = replace(CONFIG, logging=replace(CONFIG.logging, every=5))
    text = failing_session(run_dir, KeyboardInterrupt(), config=other)
    assert text == kept["status.json"]
    assert {name: (run_dir / name).read_text() for name in kept} == kept
    assert list(run_dir.glob("config.*.yaml")) == []


def test_finished_is_written_before_anything_is_printed(run_dir, monkeypatch):
    """Whatever the terminal does to the lines, the run has ended well."""
    statuses = []

    def record(text: str) -> None:
        statuses.append(json.loads((run_dir / "status.json").read_text())["state"])
        raise RuntimeError("the terminal is gone")

    def session() -> None:
        with monitor(run_dir) as watch:
            feed(watch, [result() for _ in range(7)])
            monkeypatch.setattr(watch.mesh, "print", record)
            watch.final(Evaluation(loss=2.0, bpb=1.0), sample="text")

    with pytest.raises(RuntimeError, match="gone"):
        session()
    assert statuses == ["finished"]
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"
    assert read_metrics(run_dir)[-1]["val/loss"] == 2.0


@pytest.mark.parametrize("before", ["failed", "running", None, "finished at another length"])
def test_having_all_steps_is_not_enough_to_be_finished(run_dir, before):
    """Its last evaluation has failed, it begins with another's last checkpoint, or it is now shorter."""
    status = {"state": before, "step": 7, "total_steps": 7}
    if before == "finished at another length":
        status |= {"state": "finished", "step": 9, "total_steps": 9}
    if before:
        (run_dir / "status.json").write_text(json.dumps(status))
    assert json.loads(failing_session(run_dir, RuntimeError("lost")))["state"] == "running"
    assert (run_dir / "config.yaml").is_file()
    assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"


def test_options_that_differ_from_the_checkpoints_are_printed(run_dir, capsys):
    state = RunState(step=2, tokens=80)
    changed = ["optim.lr 0.001 -> 0.0005", "logging.every 1 -> 3"]
    loaded = Loaded(state, Path("step-2"), warnings=[], changed=changed, optimizer_steps=2)
    with monitor(run_dir, state, loaded=loaded):
        pass
    line = "note: changed since that checkpoint: optim.lr 0.001 -> 0.0005, logging.every 1 -> 3\n"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(("tokens", "is_printed"), [(319, False), (320, True)])
def test_a_target_that_was_passed_is_printed(run_dir, capsys, tokens, is_printed):
    """By a whole batch of 40: the last step alone may pass it by less."""
    with monitor(run_dir, RunState(step=8, tokens=tokens)):
        pass
    line = f"note: optim.total_tokens=280: this run has already trained on more, {tokens} tokens\n"
    assert (line in capsys.readouterr().out) is is_printed


def test_a_wait_for_a_slow_disk_is_told_once(run_dir, capsys):
    with monitor(run_dir) as watch:
        watch.saved([Saved(2, stopped_s=0.1, seconds=3.0, waited_s=0.9)])
        for step in (4, 6):
            watch.saved([Saved(step, stopped_s=0.1, seconds=3.0, waited_s=1.2)])
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")] == [
        "warning: training waited 1.2 s for the checkpoint of step 4, which took 3.0 s; "
        "raise checkpoint.every"
    ]
    assert read_metrics(run_dir)[-1]["perf/save_s"] == 3.0


def test_a_failed_run_names_the_step_of_its_newest_checkpoint(run_dir):
    """The last save failed: the steps since the one before it are in no checkpoint."""

    def session() -> None:
        with monitor(run_dir) as watch:
            feed(watch, [result(), result()])
            make_checkpoint(run_dir / "checkpoints", 2)
            watch.saved([Saved(2, stopped_s=0.1, seconds=0.2)])
            feed(watch, [result()])
            watch.saved([Saved(3, stopped_s=0.1, seconds=0.2, problem="full")])
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        session()
    status = json.loads((run_dir / "status.json").read_text())
    assert status == {"state": "failed", "step": 2, "total_steps": 7}


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"state": ["<b>"]}', '{"step": "20"}', "\udcff"])
def test_a_damaged_status_is_one_message_and_stops_no_run(run_dir, text):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "status.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"status.json: is no"):
        read_status(run_dir)
    with monitor(run_dir):
        pass
    assert read_status(run_dir) == {"state": "stopped", "step": 0, "total_steps": 7}


def test_a_status_that_cannot_be_read_is_not_missing(run_dir, monkeypatch):
    """A study would otherwise train a finished run again."""

    def refuse(path: Path, **_: Any) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(Unreadable, match=r"status.json: cannot be read \(Input/output error\)"):
        read_status(run_dir)


@pytest.mark.parametrize(
    ("state", "becomes"), [("running", "failed"), ("stopped", "stopped"), ("finished", "finished")]
)
def test_a_run_that_hangs_is_marked_as_failed(tmp_path, state, becomes):
    write_status(tmp_path, {"state": state, "step": 4, "total_steps": 9})
    mark_failed(tmp_path)
    assert read_status(tmp_path) == {"state": becomes, "step": 4, "total_steps": 9}


def test_marking_a_run_as_failed_may_fail(tmp_path):
    (tmp_path / "status.json").mkdir()
    mark_failed(tmp_path)
    mark_failed(tmp_path / "missing")
