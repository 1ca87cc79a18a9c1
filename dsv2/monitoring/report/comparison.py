"""One self-contained HTML page that compares runs: their curves in one picture each, options, throughput.

`python -m dsv2 report RUN_DIR RUN_DIR ...` writes it. Each run has one colour. Layers, ranks and maps are
left to the page of one run, which page.py writes.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dsv2.config.changes import differing
from dsv2.config.compose import to_plain
from dsv2.errors import UserError
from dsv2.formats import fmt_count
from dsv2.model.sizes import count_parameters
from dsv2.monitoring.metrics.producers import METRICS
from dsv2.monitoring.panels import SECTIONS, Chart, ChartSection
from dsv2.monitoring.report.layouts import COLUMNS, NOTE, layout_cells
from dsv2.monitoring.report.parts import (
    ABSENT,
    Document,
    anchor,
    card,
    document,
    number,
    save,
    table,
)
from dsv2.monitoring.report.run import MOST_POINTS, Run, figures, read_run, thinned

MOST_RUNS = 24  # report.js tells as many apart: 8 colours, each solid, dashed and dotted
FEWEST_POINTS = 250  # of one curve, however many runs there are
FIGURES = ("tokens seen", "training loss", "validation loss", "bits per byte", "worst max violation")
SHOWN = tuple(section for section in SECTIONS if not all(chart.is_map for chart in section.charts))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs' folders.

    Raises:
        UserError: there are too many runs, a folder is given twice, or one is no run's; see `read_run`.
        Unreadable: the file system refuses to read a file.
    """
    if len(folders) > MOST_RUNS:
        raise UserError(f"RUN_DIR: {len(folders)} folders are given; a page shows at most {MOST_RUNS} runs")
    seen: dict[Path, Path] = {}
    for folder in folders:
        first = seen.setdefault(folder.resolve(), folder)
        if first is not folder:
            raise UserError(f"RUN_DIR={folder}: is the same folder as {first}; give each run once")
    return [read_run(folder) for folder in folders]


def labels(runs: Sequence[Run]) -> list[str]:
    """Return a text for each run that no other run has: its name, with its folder if others have the name."""
    names = [run.config.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({run.folder})"
        for name, run in zip(names, runs, strict=True)
    ]


def names_of(chart: Chart) -> tuple[str, ...]:
    """Return the chart's metrics that have one curve per run."""
    return () if chart.is_map or chart.is_family else chart.names


def comparison_data(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what report.js draws from."""
    most = max(MOST_POINTS // len(runs), FEWEST_POINTS)
    drawn = {name for section in SHOWN for chart in section.charts for name in names_of(chart)}
    first = min(int(run.rows[0]["step"]) for run in runs)
    return {
        "steps": [first - 1, max(int(run.rows[-1]["step"]) for run in runs)],
        "runs": [
            {
                "label": label,
                "series": {name: thinned(run.curve(name), most) for name in run.names if name in drawn},
            }
            for label, run in zip(labels(runs), runs, strict=True)
        ],
        "maps": [],
        "exact": [name for name, metric in METRICS.items() if metric.panel and not metric.panel.smooth],
    }


def section_html(runs: Sequence[Run], section: ChartSection) -> str:
    """Return the section's cards by group, one per metric, then the metrics that it does not draw."""
    zero: list[str] = []
    missing: list[str] = []
    cards: dict[str, str] = {}
    for chart in section.charts:
        for name in names_of(chart):
            having = [run for run in runs if name in run.names]
            if not having:
                missing.append(name)
            elif all(run.is_zero([name]) for run in having):
                zero.append(name)
            else:
                unit = ", ".join(filter(None, (name, METRICS[name].unit)))
                cards[chart.group] = cards.get(chart.group, "") + card(chart.title, unit, "runs", name=name)
    parts = []
    for group, text in cards.items():
        heading = f"<h3>{escape(group)}</h3>" if group else ""
        parts.append(f'{heading}<div class="grid">{text}</div>')
    for text, names in {"0 in every run that has values": zero, "No values in these runs": missing}.items():
        parts.append(f'<p class="none">{text}: {escape(", ".join(names))}</p>' if names else "")
    title = escape(section.title)
    return f'<section id="{anchor(section.title)}"><h2>{title}</h2>{"".join(parts)}</section>'


def marked(names: Sequence[str]) -> list[str]:
    """Return the runs' labels as HTML; report.js puts each run's colour before its label."""
    return [f'<span data-run="{index}">{escape(name)}</span>' for index, name in enumerate(names)]


def overview(runs: Sequence[Run]) -> str:
    """Return the table of the runs: where each is, how far it has come, and its main figures."""
    rows = []
    for label, run in zip(marked(labels(runs)), runs, strict=True):
        counts = count_parameters(run.config.model)
        state = escape(run.status.get("state", "unknown"))
        step = str(int(run.rows[-1]["step"]))
        of = f" of {run.status['total_steps']}" if "total_steps" in run.status else ""
        found = figures(run)
        values = [number(found[name]) if name in found else ABSENT for name in FIGURES]
        sizes = [fmt_count(counts.total), fmt_count(counts.active)]
        badge = f'<span class="badge {state}">{state}</span>'
        rows.append([label, badge, step + escape(of), *sizes, *values, escape(str(run.folder))])
    head = ["run", "state", "step", "parameters", "active", *FIGURES, "folder"]
    return table(head, rows)


def options(runs: Sequence[Run]) -> str:
    """Return the table of the options whose values differ."""
    found = differing([to_plain(run.config) for run in runs])
    if not found:
        return '<p class="none">All options of these runs are equal.</p>'
    rows = [
        [escape(name), *(ABSENT if value is None else escape(value) for value in values)]
        for name, values in found.items()
    ]
    return table(["option", *marked(labels(runs))], rows)


def final_values(runs: Sequence[Run]) -> str:
    """Return the table of every metric's last value in each run."""
    names = dict.fromkeys(name for run in runs for name in run.names if "/L" not in name)
    rows = [
        [escape(name), *(number(run.last(name)) if name in run.names else ABSENT for run in runs)]
        for name in names
    ]
    return table(["metric", *marked(labels(runs))], rows)


def build_comparison(runs: Sequence[Run]) -> str:
    """Return the whole page."""
    sections = {
        "Different options": options(runs),
        "Throughput by layout": table(
            ["run", *COLUMNS],
            [
                [label, *map(escape, layout_cells(run))]
                for label, run in zip(marked(labels(runs)), runs, strict=True)
            ],
        )
        + f'<p class="none">{escape(NOTE)}</p>',
    }
    tables = "".join(
        f'<section id="{anchor(title)}"><h2>{title}</h2>{text}</section>' for title, text in sections.items()
    )
    title = f"{len(runs)} runs"
    body = f"""<h1>{title}</h1>
<p class="lead">Layers, ranks, maps and the whole configuration are on the page of one run:
python -m dsv2 report RUN_DIR</p>
<noscript><p>Curves need JavaScript; the tables do not.</p></noscript>
{overview(runs)}{tables}
{"".join(section_html(runs, section) for section in SHOWN)}
<section id="final-values"><h2>Final values</h2>{final_values(runs)}</section>"""
    has_tokens = any("train/tokens" in run.names for run in runs)
    switch = '<label><input type="checkbox" id="tokens"> over tokens</label>' if has_tokens else ""
    thinned_note = "Long curves are thinned; the extremes of every stretch are kept. "
    return document(
        Document(
            title=title,
            sections=[*sections, *(section.title for section in SHOWN), "Final values"],
            body=body,
            notes=thinned_note,
            data=comparison_data(runs),
            controls=f'{switch}<div class="legend runs">{"".join(marked(labels(runs)))}</div>',
        )
    )


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write the page that compares the runs in `folders`; return `out`.

    Raises:
        UserError: a folder is no run's or is given twice, or `out` cannot be written.
    """
    return save(build_comparison(read_runs(folders)), out)
