"""How fast a run's layout is: one row of the table "Throughput by layout"."""

import statistics

from dsv2.formats import fmt_count
from dsv2.monitoring.report.parts import ABSENT
from dsv2.monitoring.report.run import Run
from dsv2.parallel.plan import Dim, ParallelPlan

COLUMNS = (
    "commit",
    "device",
    "ranks",
    "hosts",
    "EP",
    "DP",
    "ZeRO",
    "micro-batch",
    "batch",
    "tokens/s per GPU",
    "MFU",
    "peak memory, GiB",
)
NOTE = (
    "Each row is the run's last session. Speed and MFU are medians over the second half of its steps. On the "
    "CPU, each process counts as a GPU. Micro-batch and batch count sequences."
)
SPEEDS = ("perf/tok_s", "perf/tok_s_gpu")


def ranks_of(row: dict[str, float]) -> int:
    """Return how many ranks computed a step that has both speeds."""
    return round(row["perf/tok_s"] / row["perf/tok_s_gpu"])


def last_session(run: Run) -> list[dict[str, float]]:
    """Return the rows of the last session's steps. Older runs have no file of their sessions.

    For these, the last session is the steps at the end that as many ranks computed.
    """
    rows = [row for row in run.rows if all(row.get(name, 0) > 0 for name in SPEEDS)]
    if run.sessions:
        return [row for row in rows if row["step"] > run.sessions[-1]["step"]]
    begin = len(rows)
    while begin and ranks_of(rows[begin - 1]) == ranks_of(rows[-1]):
        begin -= 1
    return rows[begin:]


def layout_cells(run: Run) -> list[str]:
    """Return the texts of the run's row, one per column."""
    rows = last_session(run)
    steady = rows[len(rows) // 2 :]
    session = run.sessions[-1] if run.sessions else {}
    ranks = session.get("ranks") or (ranks_of(rows[-1]) if rows else None)
    config = run.config
    sizes = ParallelPlan.of(config.parallel, ranks).sizes if ranks else {}
    speed = _median(steady, "perf/tok_s_gpu")
    mfu = _median(steady, "perf/mfu")
    memory = max((row["perf/mem_gib"] for row in rows if "perf/mem_gib" in row), default=None)
    values = [
        session.get("commit"),
        session.get("device"),
        ranks,
        session.get("hosts"),
        config.parallel.expert_parallel_size,
        sizes.get(Dim.dp),
        config.parallel.zero_stage,
        config.runtime.micro_batch_size,
        config.optim.batch_size,
        None if speed is None else fmt_count(speed),
        None if mfu is None else f"{mfu:.1%}",
        None if memory is None else f"{memory:.2f}",
    ]
    return [ABSENT if value is None else str(value) for value in values]


def _median(rows: list[dict[str, float]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return statistics.median(values) if values else None
