"""What a run reports: console lines, metrics, alerts and status.json.

The training loop calls it with what has happened. Rank 0 prints and writes; sums are over all ranks. The
metrics themselves are declared and computed in dsv2/monitoring/metrics.
"""

import math
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from data.streams.sources import source_of
from dsv2.checkpoint.files import newest_step
from dsv2.checkpoint.state import Loaded, RunState, Saved
from dsv2.config.compose import to_yaml
from dsv2.config.schema import Config
from dsv2.errors import Diverged, Unreadable, UserError
from dsv2.kernels.specs import find_spec
from dsv2.model.sizes import count_parameters
from dsv2.moe.stats import RoutingStats
from dsv2.monitoring import console
from dsv2.monitoring.alerts import Alerts
from dsv2.monitoring.environment import this_process
from dsv2.monitoring.metrics.base import Producer, RankTimes, When, Window
from dsv2.monitoring.metrics.producers import PRODUCERS
from dsv2.monitoring.sessions import record_session
from dsv2.monitoring.status import read_status, write_status
from dsv2.monitoring.tracker import Tracker
from dsv2.parallel.mesh import Mesh
from dsv2.parallel.plan import Dim
from dsv2.parallel.progress import Part
from dsv2.training.evaluate import Evaluation
from dsv2.training.results import StepResult
from dsv2.training.rundir import save_config
from dsv2.training.schedule import StepPlan, count_steps
from dsv2.training.spikes import SpikeCounts

LONG_WAIT = 1.0  # seconds


class Monitor:
    """Follows the loop: `step` after every step; `evaluation`, `saved` and `final` as they occur.

    As a context it begins and ends the session's report, whatever ends the run.
    """

    def __init__(
        self, config: Config, mesh: Mesh, tracker: Tracker, state: RunState, loaded: Loaded | None
    ) -> None:
        self.config = config
        self.mesh = mesh
        self.tracker = tracker
        self._first = state  # where this session begins
        self._loaded = loaded
        self._step = state.step  # steps done
        self._total_steps = count_steps(
            config.optim, config.data.sequence_length, step=state.step, tokens=state.tokens
        )
        self._producers: dict[When, list[Producer[Any]]] = {when: [] for when in When}
        for producer in PRODUCERS:
            self._producers[producer.when].append(producer(config, mesh))
        moe_layers = config.model.num_hidden_layers - config.model.first_k_dense_replace
        experts = moe_layers * config.model.n_routed_experts
        self._alerts = Alerts(config.logging, routed_experts=experts, hosts=mesh.hosts)
        self._begin_window()
        self._has_waited = False  # for a save, and a line has said so
        # A finished run stays finished, whatever happens to another evaluation or while it is printed.
        self._is_finished = self._earlier_status() == self._status("finished", state.step)

    def __enter__(self) -> "Monitor":
        processes = self.mesh[Dim.world].objects(this_process(self.mesh.device))
        if self.mesh.is_main and not self._is_finished:
            save_config(self.config.run_dir, to_yaml(self.config), resumed=self._first.step > 0)
            record_session(self.config.run_dir, self.mesh, self._first.step, processes)
        for line in self._opening_lines():
            self.mesh.print(line)
        self._write_status("finished" if self._is_finished else "running")
        self._loop_start = time.perf_counter()
        self._last_mark = self._loop_start
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            if self._is_finished:
                self._write_status("finished")
            else:  # the steps after the newest checkpoint are lost
                self._write_status("failed", self._saved_step())
            if isinstance(error, Diverged):
                self.tracker.alert(f"{self.config.name} diverged", str(error))
            return
        finished = self._step == self._total_steps
        self._write_status("finished" if finished else "stopped")
        for line in console.end_lines(
            finished=finished,
            step=self._step,
            total_steps=self._total_steps,
            stop_step=self.config.stop_step,
            seconds=time.perf_counter() - self._loop_start,
            run_dir=self.config.run_dir,
            dashboard=self.tracker.dashboard_hint,
        ):
            self.mesh.print(line)

    def step(self, plan: StepPlan, result: StepResult, spikes: SpikeCounts | None = None) -> None:
        """Report a finished step. Collective at the end of a window of `logging.every` steps.

        Args:
            spikes: what the run has refused so far; None with spike.policy=off.

        Raises:
            Diverged: the loss or the gradient norm is not a finite number.
        """
        now = time.perf_counter()
        self.mesh.progress.enter(Part.report)
        step = plan.step + 1
        finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm) and result.grad_norm >= 0
        if result.updated and not finite:
            raise Diverged(
                f"step {step}: total loss {result.loss}, gradient norm {result.grad_norm}; this step is not "
                "saved; try a lower optim.lr"
            )
        self._step = step
        if not result.updated:
            self.mesh.print(f"spike: step {step}: total loss {result.loss:.3f}; its update is skipped")
        metrics = self._step_metrics(plan, result, spikes, now - self._last_mark)
        self.tracker.log(metrics, step=step)
        seconds_per_step = (now - self._loop_start) / (step - self._first.step)
        self.mesh.print(
            console.step_line(
                step=step,
                total_steps=self._total_steps,
                loss=result.lm_loss,
                grad_norm=result.grad_norm,
                lr=plan.lr,
                tok_s=metrics["perf/tok_s"],
                mem_gib=metrics["perf/mem_gib"],
                eta_s=seconds_per_step * (self._total_steps - step),
                mfu=metrics.get("perf/mfu"),
            )
        )
        for notice in self._alerts.check(step, metrics):
            self.mesh.print(f"alert: {notice.title}, {notice.text}")
            self.tracker.alert(f"{self.config.name}: {notice.title}", notice.text)
        self._last_mark = time.perf_counter()

    def _begin_window(self) -> None:
        """Forget the sums of this rank over the window's steps."""
        self._stats: RoutingStats | None = None
        self._window_steps = 0
        self._wait_ms = 0.0
        self._times = RankTimes()

    def _step_metrics(
        self, plan: StepPlan, result: StepResult, spikes: SpikeCounts | None, seconds: float
    ) -> dict[str, Any]:
        """Add the step to its window; return the values that are due."""
        stats = result.stats if self._stats is None else self._stats.plus(result.stats)
        self._stats = stats
        self._window_steps += 1
        self._wait_ms += result.wait_ms
        self._times = self._times.plus(RankTimes(result.work_ms / 1e3, result.data_s, seconds))
        window = Window(
            steps=self._window_steps,
            plan=plan,
            result=result,
            seconds=seconds,
            data_seconds=seconds - result.seconds,
            stats=stats,
            wait_ms=self._wait_ms,
            times=self._times,
            spikes=spikes,
        )
        is_last = self._step == self._total_steps
        metrics = self._values(When.step, window)
        if self._step % self.config.logging.every == 0 or is_last:
            metrics |= self._values(When.window, window)
            if self._step % self.config.logging.maps_every == 0 or is_last:
                metrics |= self._values(When.maps, window)
            self._begin_window()
        return metrics

    def rewound(self, plan: StepPlan, result: StepResult, state: RunState) -> None:
        """Report that a spike has sent the run back to `state`."""
        self.mesh.print(
            f"spike: step {plan.step + 1}: total loss {result.loss:.3f}; back to step {state.step}, "
            "without the batches since then"
        )
        self._step = state.step
        self._begin_window()
        self.tracker.rewound()
        self._last_mark = time.perf_counter()

    def _values(self, when: When, seen: Window | Evaluation | Saved) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for producer in self._producers[when]:
            values |= producer.values(seen)
        return values

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Report an evaluation. Its time does not count for the next step."""
        self.tracker.log(self._values(When.evaluation, evaluation), step=step)
        self._print_evaluation(step, evaluation)
        self._last_mark = time.perf_counter()

    def _print_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self.mesh.print(
            console.eval_line(
                step=step,
                total_steps=self._total_steps,
                loss=evaluation.loss,
                bits_per_byte=evaluation.bpb,
            )
        )

    def saved(self, finished: list[Saved]) -> None:
        """Report saves that have finished. Their time does not count for the next step."""
        for save in finished:
            self.tracker.log(self._values(When.save, save), step=self._step)
            if save.problem is not None:
                self.mesh.print(f"warning: {save.problem}; the run continues")
            elif save.waited_s > LONG_WAIT and not self._has_waited:
                self._has_waited = True
                self.mesh.print(
                    f"warning: training waited {save.waited_s:.1f} s for the checkpoint of step {save.step}, "
                    f"which took {save.seconds:.1f} s; raise checkpoint.every"
                )
        if finished:
            self._write_status("running")
        self._last_mark = time.perf_counter()

    def profiled(self, lines: list[str]) -> None:
        """Report a profile that has been written. Its time does not count for the next step."""
        for line in lines:
            self.mesh.print(line)
        if lines:
            self._last_mark = time.perf_counter()

    def final(self, evaluation: Evaluation, sample: str | None) -> None:
        """Report the last evaluation, the loss that token frequencies alone would give, and a sample."""
        self.tracker.log(self._values(When.evaluation, evaluation), step=self._total_steps)
        self._is_finished = True
        self._write_status("finished")
        self._print_evaluation(self._total_steps, evaluation)
        if (unigram := source_of(self.config.data).unigram_nats(self.config.data)) is not None:
            self.mesh.print(
                f"validation loss {evaluation.loss:.3f} nats per token; token frequencies alone would give "
                f"{unigram:.3f} (unigram entropy)"
            )
        if sample is not None:
            self.mesh.print("sample:")
            for line in sample.splitlines():
                self.mesh.print(f"  | {line}")

    def _opening_lines(self) -> list[str]:
        config = self.config
        loaded = self._loaded
        begun_from = loaded.path if loaded and loaded.state.step == 0 else None
        if loaded is None and config.init_from is not None:
            begun_from = Path(config.init_from)
        lines = [f"warning: {warning}" for warning in (loaded.warnings if loaded else [])]
        if loaded and config.init_from is not None:
            lines.append(
                f"note: init_from={config.init_from} is ignored: the run continues from {loaded.path}"
            )
        counts = count_parameters(config.model)
        lines += console.start_lines(
            name=config.name,
            parameters=counts.total,
            active_parameters=counts.active,
            total_steps=self._total_steps,
            total_tokens=config.optim.total_tokens,
            layout=self.mesh.plan.text(self.mesh.device.type, config.parallel, config.runtime),
            run_dir=config.run_dir,
            resumed_step=self._first.step or None,
            begun_from=begun_from,
            dashboard=self.tracker.dashboard_hint,
        )
        if find_spec(config.runtime.kernels).needs_gpu:
            lines.append("the first step compiles kernels, which may take a minute")
        if loaded and loaded.changed:
            lines.append(f"note: changed since that checkpoint: {', '.join(loaded.changed)}")
        return lines + console.schedule_notes(
            config.optim,
            step=self._first.step,
            tokens=self._first.tokens,
            total_steps=self._total_steps,
            sequence_length=config.data.sequence_length,
        )

    def _saved_step(self) -> int:
        """Return the step of the newest whole checkpoint; without one, the step where this session began."""
        saved = None
        with suppress(Unreadable):
            saved = newest_step(self.config.run_dir / "checkpoints")
        return self._first.step if saved is None else saved

    def _earlier_status(self) -> dict[str, Any]:
        try:
            return read_status(self.config.run_dir)
        except (UserError, Unreadable):  # the file is replaced at once, so a damaged one stops no run
            return {}

    def _status(self, state: str, step: int) -> dict[str, Any]:
        return {"state": state, "step": step, "total_steps": self._total_steps}

    def _write_status(self, state: str, step: int | None = None) -> None:
        if not self.mesh.is_main:
            return
        try:
            write_status(self.config.run_dir, self._status(state, self._step if step is None else step))
        except OSError as error:  # a full disk must not end a run
            self.mesh.print(f"warning: status.json could not be written: {error}")
