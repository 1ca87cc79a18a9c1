"""What the report's page shows of a run. Everything is read from the run's files.

A run that is still training can be read like a finished one. page.py turns the result into HTML.
"""

import math
import re
import statistics
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from data.reading import is_file, names_in, read_text
from dsv2.config.compose import read_saved
from dsv2.config.schema import Config
from dsv2.errors import UserError
from dsv2.monitoring.metrics.producers import METRICS
from dsv2.monitoring.panels import Chart, ChartSection
from dsv2.monitoring.pictures import HEAT_COLOURS, HEAT_STOPS
from dsv2.monitoring.records import METRICS_FILE, NO_METRICS, read_maps, read_metrics
from dsv2.monitoring.sessions import read_sessions
from dsv2.monitoring.status import read_status

MOST_POINTS = 2000  # of one curve
MOST_MAPS = 100


class Curve(NamedTuple):
    steps: list[int]
    values: list[float | None]  # None: not a number


class Run(NamedTuple):
    """All that is known of a run."""

    folder: Path
    rows: list[dict[str, float]]  # see read_metrics
    maps: list[dict[str, Any]]  # see read_maps
    status: dict[str, Any]  # {} if the file is missing
    config: Config
    config_texts: dict[str, str]  # file name -> text, newest first
    sessions: list[dict[str, Any]]  # see read_sessions

    @property
    def names(self) -> list[str]:
        """Return every metric of the run, in the order of first appearance."""
        return [name for name in dict.fromkeys(chain(*self.rows)) if name not in NO_METRICS]

    def curve(self, name: str) -> Curve:
        """Return a metric's values over steps."""
        points = [(int(row["step"]), row[name]) for row in self.rows if name in row]
        steps = [step for step, _ in points]
        return Curve(steps, [value if math.isfinite(value) else None for _, value in points])

    def last(self, name: str) -> float | None:
        """Return a metric's last value; None if it has no value, or if the last one is not a number."""
        values = self.curve(name).values
        return values[-1] if values else None

    def names_of(self, chart: Chart) -> list[str]:
        """Return the chart's metrics that the run has; the layers' names replace `vio/L*`."""
        if chart.is_family:
            return [name for name in self.names if name.startswith(chart.names[0].removesuffix("*"))]
        known = {*self.names, *(name for row in self.maps for name in row)}
        return [name for name in chart.names if name in known]

    def is_zero(self, names: list[str]) -> bool:
        """Return whether these scalars are always 0; one line of text then says more than a picture."""
        return all(name in self.names and not any(self.curve(name).values) for name in names)


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: the folder is no run's, the run has no finished step, or a file is broken.
        Unreadable: the file system refuses to read a file.
    """
    rows = read_metrics(folder)
    if not rows:
        raise UserError(f"{folder / METRICS_FILE}: the file is empty; the run has no finished step yet")
    newest = folder / "config.yaml"
    config = read_saved(newest)
    names = [name for name in names_in(folder) if re.fullmatch(r"config\..*\.yaml", name)]
    older = [folder / name for name in names if is_file(folder / name)]
    older.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    texts = {path.name: _text(path) for path in [newest, *older]}
    return Run(
        folder=folder,
        rows=rows,
        # A killed session may have left maps of steps that the run did not reach again.
        maps=[row for row in read_maps(folder) if row["step"] <= rows[-1]["step"]],
        status=read_status(folder),
        config=config,
        config_texts=texts,
        sessions=read_sessions(folder),
    )


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except ValueError as error:
        raise UserError(f"{path}: is no text ({error})") from None


def environment(session: dict[str, Any]) -> dict[str, str]:
    """Return what a session computed with, as the rows of a table: title and text."""
    rows = {
        "commit": session["commit"],
        "changed files": ", ".join(map(str, session.get("changed", []))),
        "diff": session.get("diff", ""),
        "command": " ".join(map(str, session.get("command", []))),
        "device": f"{session['ranks']} x {session['device']}",
    }
    for machine in session.get("machines", []):
        facts = machine if isinstance(machine, dict) else {}
        texts = [f"{name} {value}" for name, value in facts.items() if name not in ("host", "gpus")]
        gpus = Counter(map(str, facts.get("gpus") or []))
        texts += [f"{count} x {gpu}" for gpu, count in gpus.items()]
        rows[f"machine {facts.get('host')}"] = "; ".join(texts)
    packages = [f"{name} {version}" for name, version in session.get("versions", {}).items()]
    rows["versions"] = ", ".join(packages)
    return {title: text for title, text in rows.items() if text}


def thinned(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """Return at most `most` points: the smallest and the largest of each stretch, so that spikes stay."""
    if len(curve.steps) <= most:
        return curve
    stretch = math.ceil(len(curve.steps) / (most // 2))
    kept: set[int] = set()
    for start in range(0, len(curve.steps), stretch):
        numbers = [
            (value, index)
            for index, value in enumerate(curve.values[start : start + stretch], start)
            if value is not None
        ]
        kept |= {min(numbers)[1], max(numbers)[1]} if numbers else {start}
    chosen = sorted(kept)
    return Curve([curve.steps[index] for index in chosen], [curve.values[index] for index in chosen])


def spread(items: list[Any], most: int) -> list[Any]:
    """Return at most `most` evenly chosen items, with the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def page_data(run: Run) -> dict[str, Any]:
    """Return what report.js draws from."""
    model = run.config.model
    series = {}
    for name in run.names:
        curve = run.curve(name)
        if "/L" in name:  # all layers must keep the same steps
            curve = Curve(*(spread(part, MOST_POINTS // 4) for part in curve))
        series[name] = thinned(curve)
    steps = [int(row["step"]) for row in run.rows]
    return {
        "steps": [steps[0] - 1, steps[-1]],
        "series": series,
        "maps": spread(run.maps, MOST_MAPS),
        "first_layer": model.first_k_dense_replace,
        "groups": model.n_group,
        "heat": {"stops": HEAT_STOPS, "colours": HEAT_COLOURS},
        "exact": [name for name, metric in METRICS.items() if metric.panel and not metric.panel.smooth],
    }


def figures(run: Run) -> dict[str, float]:
    """Return the few figures that a reader looks for first, by their label."""
    speeds = [row["perf/tok_s"] for row in run.rows if "perf/tok_s" in row]
    shown = {
        "tokens seen": run.last("train/tokens"),
        "training loss": run.last("train/loss_lm"),
        "validation loss": run.last("val/loss"),
        "bits per byte": run.last("val/bpb"),
        "tokens per second": statistics.median(speeds) if speeds else None,
        "worst max violation": run.last("moe/max_vio_max"),
        "dead experts": run.last("moe/dead"),
        "device max / mean": run.last("dev/load_max_mean"),
    }
    return {label: value for label, value in shown.items() if value is not None}


def quiet_names(run: Run, section: ChartSection) -> dict[str, list[str]]:
    """Return the metrics that the section does not draw, by the reason."""
    zero: list[str] = []
    missing: list[str] = []
    for chart in section.charts:
        names = run.names_of(chart)
        if names and run.is_zero(names):
            zero += chart.names
        elif not names:
            missing += chart.names
        elif not chart.is_family:
            missing += [name for name in chart.names if name not in names]
    return {"0 all the time": zero, "No values in this run": missing}
