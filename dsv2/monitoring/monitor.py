"""What a run tells: console lines, metrics, status.json. Rank 0 speaks; sums are over all ranks."""

import json
import math
import resource
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from data.streams.sources import source_of
from dsv2.checkpoint.state import Loaded, RunState
from dsv2.config.compose import to_plain, to_yaml
from dsv2.config.schema import Config, Precision
from dsv2.errors import Diverged
from dsv2.model.sizes import count_parameters, flops_per_token
from dsv2.moe.stats import RoutingStats
from dsv2.moe.traffic import bytes_per_row
from dsv2.monitoring import console
from dsv2.monitoring.alerts import Alerts
from dsv2.monitoring.metrics import balance_metrics, exchange_metrics, routing_maps, routing_metrics
from dsv2.monitoring.tracker import open_tracker
from dsv2.parallel.gpus import peak_flops
from dsv2.parallel.mesh import Mesh
from dsv2.parallel.plan import Dim
from dsv2.training.evaluate import Evaluation, Evaluator
from dsv2.training.results import StepResult
from dsv2.training.rundir import STATUS, read_status
from dsv2.training.schedule import StepPlan, count_steps


class Monitor:
    """Follows the loop: `data_ready` and `step` once a step, `evaluation` and `note` as they come.

    As a context it opens the run's tracker and closes it, whatever ends the run.
    """

    def __init__(self, config: Config, mesh: Mesh, run_dir: Path, state: RunState, loaded: Loaded | None):
        self.config, self.mesh, self.run_dir, self.state = config, mesh, run_dir, state
        self.total_steps = count_steps(config.optim, config.data.sequence_length, state.step, state.tokens)
        self._flops = flops_per_token(config.model, config.data.sequence_length)
        on_gpu = mesh.device.type == "cuda"
        self._peak = peak_flops(torch.cuda.get_device_name(mesh.device)) if on_gpu else None
        model = config.model
        moe_layers = model.num_hidden_layers - model.first_k_dense_replace
        self._alerts = Alerts(config.logging, routed_experts=moe_layers * model.n_routed_experts)
        self._window: RoutingStats | None = None
        self._window_steps = 0
        self._wait_ms = 0.0  # of the window
        self._changed = loaded.changed if loaded else []
        self._first_step = state.step
        # Then nothing is left but another evaluation: the run stays finished, whatever becomes of that.
        self._was_finished = read_status(run_dir) == self._status("finished")
        self._begun_from = loaded.path if loaded and loaded.state.step == 0 else None
        if loaded is None and config.init_from is not None:
            self._begun_from = Path(config.init_from)
        for warning in loaded.warnings if loaded else []:
            self.note(f"warning: {warning}")
        if loaded and config.init_from is not None:
            self.note(f"note: init_from={config.init_from} is not read: the run goes on from {loaded.path}")

    def __enter__(self) -> "Monitor":
        config = self.config
        resumed = self._first_step or None
        if self.mesh.is_main and not self._was_finished:
            save_config(self.run_dir, to_yaml(config), resumed=resumed is not None)
        self.tracker = open_tracker(
            config.logging,
            self.run_dir,
            config.name,
            to_plain(config),
            self.state.wandb_id,
            self.mesh.is_main,
        )
        counts = count_parameters(config.model)
        for line in console.start_lines(
            name=config.name,
            parameters=counts.total,
            active_parameters=counts.active,
            total_steps=self.total_steps,
            total_tokens=config.optim.total_tokens,
            layout=self.mesh.plan.text(self.mesh.device.type, config.parallel, config.runtime),
            run_dir=self.run_dir,
            resumed_step=resumed,
            begun_from=self._begun_from,
            dashboard=self.tracker.dashboard_hint,
        ):
            self.note(line)
        if self._changed:
            self.note(f"note: changed since that checkpoint: {', '.join(self._changed)}")
        if config.optim.warmup_steps > self.total_steps:
            self.note(
                f"note: optim.warmup_steps={config.optim.warmup_steps} is more than the run has: "
                f"the learning rate never reaches optim.lr={config.optim.lr:g}"
            )
        if self.state.step == self.total_steps:
            batch = config.optim.batch_size * config.data.sequence_length
            if self.state.tokens >= config.optim.total_tokens + batch:
                self.note(
                    f"note: optim.total_tokens={config.optim.total_tokens} is less than the "
                    f"{self.state.tokens} that this run was trained on"
                )
            self.note(
                "this run is finished: it is evaluated again, and nothing is trained. A larger "
                "optim.total_tokens goes on from here; name=NAME starts another run"
            )
        self.status("finished" if self._was_finished else "running")
        self._loop_start = self._last_mark = self._data_mark = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            finished = self.state.step == self.total_steps
            self.status("finished" if finished else "stopped")
            for line in console.end_lines(
                finished=finished,
                step=self.state.step,
                total_steps=self.total_steps,
                stop_step=self.config.stop_step,
                seconds=time.perf_counter() - self._loop_start,
                run_dir=self.run_dir,
                dashboard=self.tracker.dashboard_hint,
            ):
                self.note(line)
        else:
            self.status("finished" if self._was_finished else "failed")
            if isinstance(error, Diverged):
                self.tracker.alert(f"{self.config.name} diverged", str(error))
        self.tracker.close(exit_code=0 if error is None else 1)

    @property
    def wandb_id(self) -> str | None:
        """The W&B run's id on rank 0, to be kept in checkpoints."""
        return self.tracker.wandb_id

    def note(self, text: str) -> None:
        """A line for the person who watches."""
        if self.mesh.is_main:
            print(text, flush=True)

    def status(self, state: str) -> None:
        """RUN_DIR/status.json, for scripts that requeue: `running`, `stopped`, `finished` or `failed`, and
        the last step saved."""
        if self.mesh.is_main:
            partial = self.run_dir / f"{STATUS}.partial"
            try:
                partial.write_text(json.dumps(self._status(state)) + "\n")
                partial.replace(self.run_dir / STATUS)
            except OSError as error:  # a full disk must not end a run
                self.note(f"warning: status.json could not be written: {error}")

    def _status(self, state: str) -> dict[str, Any]:
        return {"state": state, "step": self.state.step, "total_steps": self.total_steps}

    def resume_clock(self) -> None:
        """The next step begins: what lies before it (evaluation, saving) is not its time."""
        self._last_mark = time.perf_counter()

    def data_ready(self) -> None:
        self._data_mark = time.perf_counter()

    def step(self, plan: StepPlan, result: StepResult) -> None:
        """Log a finished step. Collective at the end of a window of `logging.every` steps.

        Raises:
            Diverged: the loss or the gradient norm is not a finite number.
        """
        now = time.perf_counter()
        step, seconds = plan.step + 1, now - self._last_mark
        if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm) or result.grad_norm < 0:
            raise Diverged(
                f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}; stopped, nothing saved. "
                f"The last good checkpoint is in {self.run_dir / 'checkpoints'}; try a lower optim.lr"
            )
        self._window = result.stats if self._window is None else self._window.plus(result.stats)
        self._window_steps += 1
        self._wait_ms += result.wait_ms
        metrics: dict[str, Any] = self._step_metrics(plan, result, seconds)
        if step % self.config.logging.every == 0 or step == self.total_steps:
            total = RoutingStats(*(self.mesh[Dim.world].sum(x) for x in self._window))
            metrics |= routing_metrics(total, self.config.model)
            metrics |= self._exchange_metrics(self._window)
            self._window, self._window_steps = None, 0
            self._wait_ms = 0.0
            if step % self.config.logging.maps_every == 0 or step == self.total_steps:
                metrics |= routing_maps(total, self.config.model)
        self.tracker.log(metrics, step=step)
        done = step - self._first_step
        self.note(
            console.step_line(
                step=step,
                total_steps=self.total_steps,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=plan.lr,
                tok_s=metrics["perf/tok_s"],
                mem_gib=metrics["perf/mem_gib"],
                eta_s=(now - self._loop_start) / done * (self.total_steps - step),
                mfu=metrics.get("perf/mfu"),
            )
        )
        for alert in self._alerts.check(step, metrics):
            self.note(f"alert: {alert.title}, {alert.text}")
            self.tracker.alert(f"{self.config.name}: {alert.title}", alert.text)
        self.state = self.state.after(step, plan.tokens_after)

    def _exchange_metrics(self, window: RoutingStats) -> dict[str, float]:
        model, runtime, mesh = self.config.model, self.config.runtime, self.mesh
        itemsize = 2 if runtime.precision is Precision.bf16 else 4
        sizes = (model.hidden_size, model.num_experts_per_tok, itemsize, runtime.recompute)
        wait_ms = torch.tensor(self._wait_ms, dtype=torch.float64, device=mesh.device)
        return exchange_metrics(
            mesh[Dim.dp].gather(mesh[Dim.pp].sum(window.rows_out)),  # a stage counts its own layers
            mesh[Dim.dp].gather(mesh[Dim.pp].sum(window.rows_in)),
            mesh[Dim.world].gather(wait_ms),
            bytes_per_row(*sizes),
            self._window_steps,
        )

    def _step_metrics(self, plan: StepPlan, result: StepResult, seconds: float) -> dict[str, float]:
        tok_s = (plan.tokens_after - plan.tokens) / seconds
        flops_gpu = tok_s / self.mesh.plan.world * self._flops
        metrics = {
            "train/loss": result.loss,
            "train/loss_lm": result.lm_loss,
            "train/grad_norm": result.grad_norm,
            "train/lr": plan.lr,
            "train/batch_seqs": float(plan.batch_size),
            "train/tokens": float(plan.tokens_after),
            **balance_metrics(result.balance, self.config.model.balance),
            "perf/tok_s": tok_s,
            "perf/tok_s_gpu": tok_s / self.mesh.plan.world,
            "perf/tflops": flops_gpu / 1e12,
            "perf/step_s": seconds,
            "perf/data_s": self._data_mark - self._last_mark,
            "perf/mem_gib": self._peak_memory_gib(),
        }
        if self._peak is not None:
            metrics["perf/mfu"] = flops_gpu / self._peak
        return metrics

    def _peak_memory_gib(self) -> float:
        if self.mesh.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.mesh.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        self.tracker.log({"val/loss": evaluation.loss, "val/bpb": evaluation.bpb}, step=step)
        self.note(
            console.eval_line(
                step=step,
                total_steps=self.total_steps,
                loss=evaluation.loss,
                bits_per_byte=evaluation.bpb,
            )
        )

    def finish(self, evaluator: Evaluator) -> None:
        """The last evaluation, against a model that knows only how often each token occurs, and a sample."""
        result = evaluator.evaluate()
        self.evaluation(self.total_steps, result)
        if (unigram := source_of(self.config.data).unigram_nats(self.config.data)) is not None:
            self.note(
                f"validation loss {result.loss:.3f} nats a token; by each token's frequency alone "
                f"(unigram entropy) {unigram:.3f}"
            )
        if self.config.eval.sample_tokens:
            self.note("sample:")
            for line in evaluator.sample().splitlines():
                self.note(f"  | {line}")


def save_config(run_dir: Path, yaml: str, resumed: bool) -> None:
    """The resolved configuration beside the run's files; a resumed run's earlier one is kept."""
    run_dir.mkdir(parents=True, exist_ok=True)
    target = run_dir / "config.yaml"
    if resumed and target.exists() and target.read_text() != yaml:
        count = len(list(run_dir.glob("config.*.yaml")))
        target.rename(run_dir / f"config.{count}.yaml")
    target.write_text(yaml)
