"""One self-contained HTML page of a run: curves, routing maps over time, final values, configuration.

`python -m dsv2 report RUN_DIR` writes it. The page needs no network. report.js draws the curves and maps.
comparison.py writes the page of several runs.
"""

import json
from html import escape
from pathlib import Path

from dsv2.formats import fmt_count
from dsv2.model.sizes import count_parameters
from dsv2.monitoring.metrics.base import PER_LAYER
from dsv2.monitoring.metrics.producers import METRICS
from dsv2.monitoring.panels import SECTIONS, Chart, ChartSection
from dsv2.monitoring.report.parts import Document, anchor, card, document, number, save, table
from dsv2.monitoring.report.run import (
    MOST_MAPS,
    MOST_POINTS,
    Run,
    environment,
    figures,
    page_data,
    quiet_names,
    read_run,
)
from dsv2.training.rundir import SESSIONS_FILE

EXPERT_LOAD = "map/expert_load"  # the map that is also shown over time


def tiles(run: Run) -> str:
    """Return the HTML tiles with the run's main figures."""
    return "".join(
        f'<div class="tile"><b>{number(value)}</b><span>{escape(label)}</span></div>'
        for label, value in figures(run).items()
    )


def chart_card(run: Run, chart: Chart) -> str:
    """Return the chart's card, or "" if there is nothing to draw."""
    names = run.names_of(chart)
    if not names or run.is_zero(names):
        return ""
    if chart.per_layer:
        return card(chart.title, chart.unit, "layers", prefix=names[0].split("/")[0])
    if chart.is_map:
        return card(chart.title, chart.unit, "map", wide=names[0] == EXPERT_LOAD, name=names[0])
    return card(chart.title, chart.unit, "curves", names=json.dumps(names))


def section_html(run: Run, section: ChartSection) -> str:
    """Return the section's cards by group, then the metrics that it does not draw."""
    parts = []
    for group in dict.fromkeys(chart.group for chart in section.charts):
        cards = "".join(chart_card(run, chart) for chart in section.charts if chart.group == group)
        heading = f"<h3>{escape(group)}</h3>" if group and cards else ""
        parts.append(f'{heading}<div class="grid">{cards}</div>' if cards else "")
    shows_experts = any(EXPERT_LOAD in chart.names for chart in section.charts)
    if shows_experts and any(EXPERT_LOAD in row for row in run.maps):
        unit = "load / uniform load, one column per map"
        controls = (
            '<div class="card controls"><button id="play">Play</button><input type="range" id="when" min="0" '
            'aria-label="step of the maps"><output id="when-step"></output></div>'
        )
        parts = [controls, *parts, '<h3>Over time</h3><div class="grid">']
        parts += [card("Experts of one layer", unit, "time", wide=True), "</div>"]
    for text, names in quiet_names(run, section).items():
        parts.append(f'<p class="none">{escape(text)}: {escape(", ".join(names))}</p>' if names else "")
    title = escape(section.title)
    return f'<section id="{anchor(section.title)}"><h2>{title}</h2>{"".join(parts)}</section>'


def final_values(run: Run) -> str:
    """Return a table of every metric's last value and range; layers have their own table."""
    lines = []
    for name in [name for name in run.names if "/L" not in name]:
        curve = run.curve(name)
        numbers = [value for value in curve.values if value is not None]
        cells = [number(curve.values[-1]), str(curve.steps[-1])]
        cells += [number(min(numbers)), number(max(numbers))] if numbers else ["", ""]
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        unit = METRICS[name].unit if name in METRICS else ""  # another version may have written the run
        lines.append(f'<tr><td>{escape(name)}</td>{body}<td class="text">{escape(unit)}</td></tr>')
    head = "".join(f"<th>{title}</th>" for title in ("metric", "last", "at step", "lowest", "highest"))
    return (
        f'<div class="card scroll"><table><thead><tr>{head}<th class="text">unit</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>{layer_table(run)}"
    )


def layer_table(run: Run) -> str:
    """Return a table of the last window: one row per layer, one column per metric that has layers."""
    layers = sorted({name.split("/")[1] for name in run.names if "/L" in name})
    if not layers:
        return ""
    columns = {
        chart.names[0].removesuffix(PER_LAYER): chart.title.removesuffix(" by layer").lower()
        for section in SECTIONS
        for chart in section.charts
        if chart.per_layer
    }
    rows = [
        [escape(layer), *(number(run.last(f"{prefix}/{layer}")) for prefix in columns)] for layer in layers
    ]
    return "<h3>By layer, last window</h3>" + table(["layer", *map(escape, columns.values())], rows)


def environment_table(run: Run) -> str:
    """Return a table of what the newest session computed with."""
    if not run.sessions:
        return '<p class="none">An earlier version computed this run and kept no record of it.</p>'
    lines = [
        f'<tr><td>{escape(title)}</td><td class="text wrap">{escape(text)}</td></tr>'
        for title, text in environment(run.sessions[-1]).items()
    ]
    earlier = len(run.sessions) - 1
    note = f"<p>{SESSIONS_FILE} also has the earlier sessions: {earlier}.</p>" if earlier else ""
    return f'<div class="card scroll"><table><tbody>{"".join(lines)}</tbody></table></div>{note}'


def configuration(run: Run) -> str:
    parts = []
    for index, (name, text) in enumerate(run.config_texts.items()):
        note = "" if index == 0 else ", of an earlier session"
        is_open = " open" if index == 0 else ""
        parts.append(
            f'<div class="card"><details{is_open}><summary>{escape(name)}{note}</summary>'
            f"<pre>{escape(text)}</pre></details></div>"
        )
    return "".join(parts)


def build_page(run: Run) -> str:
    """Return the whole page."""
    counts = count_parameters(run.config.model)
    step = int(run.rows[-1]["step"])
    name = escape(run.config.name)
    state = escape(run.status.get("state", "unknown"))
    of = escape(f" of {run.status['total_steps']}" if "total_steps" in run.status else "")
    thinned_note = (
        f"Curves are thinned to {MOST_POINTS} points; the extremes of every stretch are kept. "
        if len(run.rows) > MOST_POINTS
        else ""
    ) + (f"{MOST_MAPS} of {len(run.maps)} maps are shown. " if len(run.maps) > MOST_MAPS else "")
    body = f"""<h1>{name}</h1><span class="badge {state}">{state}</span>
<p class="lead">step {step}{of} &middot; {fmt_count(counts.total)} parameters, {fmt_count(counts.active)}
active per token &middot; {escape(str(run.folder))}</p>
<noscript><p>Curves and maps need JavaScript; the tables below do not.</p></noscript>
<div class="tiles">{tiles(run)}</div>
{"".join(section_html(run, section) for section in SECTIONS)}
<section id="final-values"><h2>Final values</h2>{final_values(run)}</section>
<section id="environment"><h2>Environment</h2>{environment_table(run)}</section>
<section id="configuration"><h2>Configuration</h2>{configuration(run)}</section>"""
    return document(
        Document(
            title=run.config.name,
            sections=[
                *(section.title for section in SECTIONS),
                "Final values",
                "Environment",
                "Configuration",
            ],
            body=body,
            notes=thinned_note,
            data=page_data(run),
        )
    )


def write_page(run_dir: Path, out: Path) -> Path:
    """Write the page of the run in `run_dir`; return `out`.

    Raises:
        UserError: the folder is no run, or `out` cannot be written.
    """
    return save(build_page(read_run(run_dir)), out)
