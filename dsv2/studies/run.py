"""Run a study: its arms, each with several seeds, through train.py; then a table of them.

    python -m dsv2 study balance
    python -m dsv2 study granularity --seeds 5 --at-once 3 optim.total_tokens=20_000_000

An arm is a set of overrides to experiment=study/NAME; overrides on the command line go to every arm. The
runs, their logs and the tables (table.md, table.json) go to DIR. Called again it goes on: finished runs are
kept. Their checkpoints are removed, as only their metrics are used. Exit codes: 0; 1 if a run failed; 2 for a
mistake. Models this small leave a GPU idle half of the time: `--at-once N` lets N runs share a machine; with
several GPUs each run has one, in turns.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from dsv2.config.compose import compose_config, to_plain
from dsv2.config.schema import Config, Device
from dsv2.errors import UserError
from dsv2.formats import fmt_count
from dsv2.model.sizes import count_parameters
from dsv2.planner.cache import elements_per_token
from dsv2.training.rundir import read_status
from dsv2.training.validate import validate

ROOT = Path(__file__).resolve().parents[2]


def _grain(split: int, shared: bool) -> list[str]:
    """8 experts of width 704, 2 of them a token's, each cut in `split`; shared: one of the 8 always runs."""
    routed, chosen = (7, 1) if shared else (8, 2)
    return [
        f"model.moe_intermediate_size={704 // split}",
        f"model.n_routed_experts={routed * split}",
        f"model.num_experts_per_tok={chosen * split}",
        f"model.n_shared_experts={split if shared else 0}",
    ]


_ALPHAS = "model.balance.alpha_{}=0.0"
STUDIES: dict[str, dict[str, list[str]]] = {
    "balance": {
        "off": [_ALPHAS.format(loss) for loss in ("expert", "device", "comm")],
        "expert": [_ALPHAS.format(loss) for loss in ("device", "comm")],
        "all": [],
        "all-dropping": ["model.balance.token_dropping=true"],
    },
    "granularity": {
        f"{split}x{'-shared' if shared else ''}": _grain(split, shared)
        for shared in (False, True)
        for split in (1, 2, 4, 8)
    },
    # Heads that make attention as large as MHA's with 8: its matrices, 2 x hidden x 64 x (heads + key heads).
    "attention": {
        "mla": ["model.attention=mla", "model.num_attention_heads=10"],
        "mha": ["model.attention=mha", "model.num_attention_heads=8"],
        "gqa": ["model.attention=gqa", "model.num_attention_heads=12", "model.num_key_value_heads=4"],
        "mqa": ["model.attention=mqa", "model.num_attention_heads=15"],
    },
}


class Job(NamedTuple):
    """One run of a study."""

    arm: str
    seed: int
    overrides: list[str]
    config: Config

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir


class Column(NamedTuple):
    """A figure of a run, for the table."""

    title: str
    metric: str
    digits: int


COLUMNS = (
    Column("validation loss", "val/loss", 4),
    Column("bits a byte", "val/bpb", 4),
    Column("max violation", "moe/max_vio", 3),
    Column("dead experts", "moe/dead", 1),
    Column("device load max/mean", "dev/load_max_mean", 3),
    Column("received max/mean", "comm/recv_max_mean", 3),
    Column("dropped", "moe/drop", 4),
    Column("tokens/s", "perf/tok_s", 0),
)


def plan(study: str, seeds: int, out: Path, overrides: list[str]) -> list[Job]:
    """Every run, a seed of all arms before the next seed.

    Raises:
        UserError: an unknown study, or a configuration that cannot run on one process.
    """
    if study not in STUDIES:
        raise UserError(f"{study}: there is no such study; one of {', '.join(STUDIES)}")
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: must be at least 1")
    jobs = []
    for seed in range(seeds):
        for arm, changes in STUDIES[study].items():
            own = [f"name={arm}-s{seed}", f"runs_dir={json.dumps(str(out.resolve()))}"]
            own += [f"seed={seed}", f"data.seed={seed}"]
            given = [f"experiment=study/{study}", *changes, *overrides, *own]
            config = compose_config(given)
            validate(config, world_size=1)
            if config.stop_step is not None:
                raise UserError(f"stop_step={config.stop_step}: a study's runs end with optim.total_tokens")
            jobs.append(Job(arm, seed, given, config))
    return jobs


def is_finished(job: Job) -> bool:
    """Whether the run is there already.

    Raises:
        UserError: it was made with another configuration; where it lies does not matter.
    """
    if read_status(job.run_dir).get("state") != "finished":
        return False
    made_with = OmegaConf.to_container(OmegaConf.load(job.run_dir / "config.yaml"))
    if {**made_with, "runs_dir": job.config.runs_dir} != to_plain(job.config):  # type: ignore[dict-item]
        raise UserError(
            f"{job.run_dir}: finished with another configuration than this command's; choose another --out, "
            "or remove it"
        )
    return True


def run(job: Job, gpu: str | None) -> int:
    """Train it, on that GPU; its exit code. What it prints goes to RUN_DIR.log."""
    environment = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    with job.run_dir.with_name(f"{job.run_dir.name}.log").open("w") as log:
        command = [sys.executable, str(ROOT / "train.py"), *job.overrides]
        return subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode


def refused(job: Job) -> int:
    """What train.py would refuse before it trains: its exit code, and its message is printed."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "dsv2", "check", "1", *job.overrides]
    return subprocess.run(command, env=environment, check=False).returncode


def gpus(config: Config) -> list[str]:
    """The GPUs that runs may take, as CUDA_VISIBLE_DEVICES names them; none where runs are on the CPU."""
    import torch

    if config.runtime.device is Device.cpu or not torch.cuda.is_available():
        return []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",") if chosen else [str(index) for index in range(torch.cuda.device_count())]


def figures(run_dir: Path) -> dict[str, float]:
    """A run's figures: evaluation at the end, median speed, routing over the last fifth of the windows."""
    from dsv2.monitoring.tracker import read_metrics

    rows, found = read_metrics(run_dir), {}
    for column in COLUMNS:
        values = [row[column.metric] for row in rows if column.metric in row]
        if column.metric.startswith("val/"):
            found[column.metric] = values[-1]
        elif column.metric.startswith("perf/"):
            found[column.metric] = statistics.median(values)
        else:
            found[column.metric] = statistics.fmean(values[-max(1, len(values) // 5) :])
    return found


def summary(study: str, jobs: list[Job], overrides: list[str], at_once: int) -> dict[str, Any]:
    """The study's result: every seed's figures, their mean and sample standard deviation."""
    arms: dict[str, Any] = {}
    for arm, changes in STUDIES[study].items():
        of_arm = [job for job in jobs if job.arm == arm]
        done = [job for job in of_arm if is_finished(job)]
        by_seed = {job.seed: figures(job.run_dir) for job in done}
        counts = count_parameters(of_arm[0].config.model)
        arms[arm] = {
            "overrides": changes,
            "parameters": counts.total,
            "active_parameters": counts.active,
            "cache_elements_per_token": elements_per_token(of_arm[0].config.model),
            "seeds": list(by_seed),
            "metrics": {
                column.metric: spread([by_seed[seed][column.metric] for seed in by_seed])
                for column in COLUMNS
                if by_seed
            },
        }
    config = jobs[0].config
    return {
        "study": study,
        "commit": commit(),
        "hardware": hardware(config),
        "runs_at_once": at_once,
        "precision": config.runtime.precision.value,
        "tokens": config.optim.total_tokens,
        "sequence_length": config.data.sequence_length,
        "batch_size": config.optim.batch_size,
        "lr": config.optim.lr,
        "overrides": overrides,
        "arms": arms,
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, and sample standard deviation where there are two values or more."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "values": values}


def commit() -> str:
    """The commit the code stands at, "-dirty" with changes to it; "unknown" outside of a repository."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def hardware(config: Config) -> str:
    import torch

    if config.runtime.device is not Device.cpu and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores"


def markdown(result: dict[str, Any]) -> str:
    """The table, and what it takes to read and repeat it."""
    caches = result["study"] == "attention"
    titles = ["arm", "parameters", "active", *(["cached elements a token"] if caches else [])]
    titles += [column.title for column in COLUMNS]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for arm, entry in result["arms"].items():
        cells = [arm, fmt_count(entry["parameters"]), fmt_count(entry["active_parameters"])]
        cells += [str(entry["cache_elements_per_token"])] if caches else []
        for column in COLUMNS:
            known = entry["metrics"].get(column.metric)
            cells.append(with_spread(known["mean"], known["std"], column.digits) if known else "no run")
        lines.append(f"| {' | '.join(cells)} |")
    seeds = {arm: entry["seeds"] for arm, entry in result["arms"].items()}
    arms = [f"- {arm}: {' '.join(e['overrides']) or 'as it is'}" for arm, e in result["arms"].items()]
    return "\n".join(
        [
            f"# Study: {result['study']}",
            "",
            *lines,
            "",
            "Mean ± sample standard deviation over seeds (of weights and of the data's order). Validation "
            "is at the end, with nothing dropped. Routing figures are means over the last fifth of the "
            "windows and over layers, dead experts summed over layers. Speed is the median step's.",
            "",
            f"Commit {result['commit']}; {result['hardware']}, {result['precision']}, "
            f"{result['runs_at_once']} at once; "
            f"{fmt_count(result['tokens'])} tokens a run, {result['batch_size']} sequences of "
            f"{result['sequence_length']} tokens a step, peak learning rate {result['lr']}; seeds {seeds}.",
            "",
            f"experiment=study/{result['study']} {' '.join(result['overrides'])}".rstrip()
            + ", and for each arm:",
            "",
            *arms,
            "",
        ]
    )


def with_spread(mean: float, std: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" if std is None else f"{mean:.{digits}f} ± {std:.{digits}f}"


def run_study(study: str, seeds: int, at_once: int, out: Path, overrides: list[str]) -> int:
    """Run what is missing and write the tables; the exit code."""
    jobs, failed = plan(study, seeds, out, overrides), []
    before = [job for job in jobs if is_finished(job)]
    for job in before:
        print(f"{job.config.name}: finished before", flush=True)
    missing = [job for job in jobs if job not in before]
    if missing and (code := refused(missing[0])):
        return code
    out.mkdir(parents=True, exist_ok=True)
    places = gpus(jobs[0].config) or [None]
    with ThreadPoolExecutor(at_once) as pool:
        started = {
            pool.submit(_timed_run, job, gpu): job
            for job, gpu in zip(missing, itertools.cycle(places), strict=False)
        }
        try:
            for count, done in enumerate(as_completed(started), start=len(before) + 1):
                job, (code, seconds) = started[done], done.result()
                progress = f"{count}/{len(jobs)} {job.config.name}"
                if code == 0 and is_finished(job):
                    shutil.rmtree(job.run_dir / "checkpoints")
                    loss = figures(job.run_dir)["val/loss"]
                    print(f"{progress}: validation loss {loss:.4f}, {seconds:.0f} s", flush=True)
                else:
                    failed.append(job.config.name)
                    print(f"{progress}: ended with exit code {code}; see {job.run_dir}.log", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # the runs under way got the interrupt too, and save
            raise
    result = summary(study, jobs, overrides, at_once)
    (out / "table.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "table.md").write_text(markdown(result))
    print(f"{out / 'table.md'}\n\n{markdown(result)}")
    if failed:
        print(f"error: {len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _timed_run(job: Job, gpu: str | None) -> tuple[int, float]:
    start = time.monotonic()
    return run(job, gpu), time.monotonic() - start


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description="Run a study and write its table.")
    parser.add_argument("study", help=", ".join(STUDIES))
    parser.add_argument("overrides", nargs="*", help="of the configuration, for every arm")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (3)")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="runs at the same time (1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where it all goes (runs/study-NAME)")
    arguments = parser.parse_intermixed_args(argv)
    out = arguments.out or Path(f"runs/study-{arguments.study}")
    try:
        if arguments.at_once < 1:
            raise UserError(f"--at-once {arguments.at_once}: must be at least 1")
        return run_study(arguments.study, arguments.seeds, arguments.at_once, out, arguments.overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        return 130
