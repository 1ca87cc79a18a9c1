"""The result of a study: figures of every run, their mean and spread, as JSON and as a table."""

import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from dsv2.config.schema import Config, Device
from dsv2.formats import fmt_count
from dsv2.model.sizes import cached_elements, count_parameters
from dsv2.monitoring.repository import read_repository
from dsv2.studies.arms import STUDIES
from dsv2.studies.jobs import Job, is_finished


class Column(NamedTuple):
    """One figure of a run: a column of the table."""

    title: str
    metric: str
    digits: int  # after the decimal point


COLUMNS = (
    Column("validation loss", "val/loss", 4),
    Column("bits per byte", "val/bpb", 4),
    Column("max violation", "moe/max_vio", 3),
    Column("dead experts", "moe/dead", 1),
    Column("device load max/mean", "dev/load_max_mean", 3),
    Column("received max/mean", "comm/recv_max_mean", 3),
    Column("dropped", "moe/drop", 4),
    Column("tokens/s", "perf/tok_s", 0),
)


def figures(run_dir: Path) -> dict[str, float]:
    """Return a run's figures by metric.

    Validation figures are those at the end. The speed is the median step's. Routing figures are means over
    the last fifth of the windows.
    """
    from dsv2.monitoring.records import read_metrics

    rows = read_metrics(run_dir)
    figures_of_run: dict[str, float] = {}
    for column in COLUMNS:
        values = [row[column.metric] for row in rows if column.metric in row]
        if column.metric.startswith("val/"):
            figures_of_run[column.metric] = values[-1]
        elif column.metric.startswith("perf/"):
            figures_of_run[column.metric] = statistics.median(values)
        else:
            last_fifth = values[-max(1, len(values) // 5) :]
            figures_of_run[column.metric] = statistics.fmean(last_fifth)
    return figures_of_run


def summary(study: str, jobs: list[Job], overrides: list[str], at_once: int) -> dict[str, Any]:
    """Return the study's result: every seed's figures, their mean and sample standard deviation."""
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
            "cache_elements_per_token": cached_elements(of_arm[0].config.model),
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
        "commit": read_repository().version,
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
    """Return the values, their mean and, for two values or more, their sample standard deviation."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "values": values}


def hardware(config: Config) -> str:
    """Return the name of the hardware that computed the runs."""
    import torch

    if config.runtime.device is not Device.cpu and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores"


def markdown(result: dict[str, Any]) -> str:
    """Return the table, with what a reader needs to understand and repeat it."""
    caches = result["study"] == "attention"
    titles = ["arm", "parameters", "active", *(["cached elements per token"] if caches else [])]
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
    arms = [f"- {arm}: {' '.join(e['overrides']) or 'no overrides'}" for arm, e in result["arms"].items()]
    return "\n".join(
        [
            f"# Study: {result['study']}",
            "",
            *lines,
            "",
            "Mean ± sample standard deviation over seeds (of the weights and of the data's order). "
            "Validation is at the end, without token dropping. Routing figures are means over the last fifth "
            "of the windows and over layers. Dead experts are summed over layers. Speed is the median step.",
            "",
            f"Commit {result['commit']}; {result['hardware']}, {result['precision']}, "
            f"{result['runs_at_once']} at once; "
            f"{fmt_count(result['tokens'])} tokens per run, {result['batch_size']} sequences of "
            f"{result['sequence_length']} tokens per step, peak learning rate {result['lr']}; seeds {seeds}.",
            "",
            f"experiment=study/{result['study']} {' '.join(result['overrides'])}".rstrip()
            + ", and for each arm:",
            "",
            *arms,
            "",
        ]
    )


def with_spread(mean: float, std: float | None, digits: int) -> str:
    """Return "mean ± std", or only the mean if there is no std."""
    return f"{mean:.{digits}f}" if std is None else f"{mean:.{digits}f} ± {std:.{digits}f}"
