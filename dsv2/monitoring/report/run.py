"""One self-contained HTML page of a run: curves, routing maps over time, final values, configuration.

    python -m dsv2 report runs/quickstart
    python -m dsv2 report runs/quickstart --out quickstart.html

It reads the run's metrics.jsonl, maps.jsonl, status.json and config.yaml, of a finished run or of one under
way, and needs no network, neither to be written nor to be looked at. Exit codes: 0; 2 for a folder that is no
run, or a file that cannot be written.
"""

import html
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from dsv2.errors import UserError
from dsv2.formats import fmt_count
from dsv2.monitoring.panels import LAYER_SUFFIX, SECTIONS, Panel, Section

PAGE = Path(__file__).parent
MOST_POINTS = 2000  # of one curve
MOST_MAPS = 100


class Curve(NamedTuple):
    steps: list[int]
    values: list[float | None]  # None: not a number


class Run(NamedTuple):
    """What is known of a run."""

    folder: Path
    rows: list[dict[str, float]]  # as dsv2.monitoring.tracker.read_metrics gives them
    maps: list[dict[str, Any]]  # as dsv2.monitoring.tracker.read_maps gives them
    status: dict[str, Any]  # {} where there is none
    config: Any  # dsv2.config.schema.Config
    config_texts: dict[str, str]  # file name -> text, the newest first

    @property
    def names(self) -> list[str]:
        """Every metric that the run has, in the order of their first appearance."""
        return [name for name in dict.fromkeys(name for row in self.rows for name in row) if name != "step"]

    def curve(self, name: str) -> Curve:
        points = [(int(row["step"]), row[name]) for row in self.rows if name in row]
        return Curve([step for step, _ in points], [v if math.isfinite(v) else None for _, v in points])

    def last(self, name: str) -> float | None:
        """The last value of a metric; None if it has none, or is not a number there."""
        return next((curve[-1] for curve in [self.curve(name).values] if curve), None)


def read_run(folder: Path) -> Run:
    """All that the page shows.

    Raises:
        UserError: not a run's folder, a run without a finished step, or broken files.
    """
    from omegaconf import OmegaConf

    from dsv2.config.compose import from_plain
    from dsv2.monitoring.tracker import METRICS_FILE, read_maps, read_metrics
    from dsv2.training.rundir import read_status

    rows = read_metrics(folder)
    if not rows:
        raise UserError(f"{folder / METRICS_FILE}: it is empty; the run has not finished a step")
    newest = folder / "config.yaml"
    if not newest.is_file():
        raise UserError(f"{newest}: no such file; is {folder} the directory of a run?")
    older = sorted(folder.glob("config.*.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)
    texts = {path.name: path.read_text() for path in [newest, *older]}
    plain = OmegaConf.to_container(OmegaConf.create(texts[newest.name]))
    return Run(
        folder=folder,
        rows=rows,
        # A killed run may have left a map of a step that it did not finish again.
        maps=[row for row in read_maps(folder) if row["step"] <= rows[-1]["step"]],
        status=read_status(folder),
        config=from_plain(plain),  # type: ignore[arg-type]
        config_texts=texts,
    )


def thinned(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """At most that many of its points: the smallest and the largest of each stretch, so that spikes stay."""
    if len(curve.steps) <= most:
        return curve
    stretch = math.ceil(len(curve.steps) / (most // 2))
    kept: set[int] = set()
    for start in range(0, len(curve.steps), stretch):
        numbers = [
            (v, i) for i, v in enumerate(curve.values[start : start + stretch], start) if v is not None
        ]
        kept |= {min(numbers)[1], max(numbers)[1]} if numbers else {start}
    chosen = sorted(kept)
    return Curve([curve.steps[i] for i in chosen], [curve.values[i] for i in chosen])


def spread(items: list[Any], most: int) -> list[Any]:
    """At most that many, evenly chosen, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def page_data(run: Run) -> dict[str, Any]:
    """What the page's script draws from; see dsv2/monitoring/report/report.js."""
    from dsv2.monitoring.tracker import HEAT_COLOURS, HEAT_STOPS

    model = run.config.model
    series = {}
    for name in run.names:
        curve = run.curve(name)
        if name.rpartition("/")[2].startswith("L"):  # layers share their steps
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
    }


def number(value: float | None) -> str:
    """For a table: 0.0123, 4.235, 12.3K."""
    if value is None:
        return "not a number"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.2e}"
    return fmt_count(value) if abs(value) >= 10_000 else f"{value:.4g}"


# ---------------------------------------------------------------- parts of the page


def tiles(run: Run) -> str:
    """The few figures that one looks for first."""
    speeds = [row["perf/tok_s"] for row in run.rows if "perf/tok_s" in row]
    figures = [
        ("tokens seen", run.last("train/tokens")),
        ("training loss", run.last("train/loss_lm")),
        ("validation loss", run.last("val/loss")),
        ("bits a byte", run.last("val/bpb")),
        ("tokens a second", statistics.median(speeds) if speeds else None),
        ("worst max violation", run.last("moe/max_vio_max")),
        ("dead experts", run.last("moe/dead")),
        ("device max / mean", run.last("dev/load_max_mean")),
    ]
    shown = [(label, value) for label, value in figures if value is not None]
    return "".join(
        f'<div class="tile"><b>{number(value)}</b><span>{label}</span></div>' for label, value in shown
    )


def card(title: str, unit: str, kind: str, wide: bool = False, **attributes: str) -> str:
    values = "".join(f' data-{key}="{html.escape(value)}"' for key, value in attributes.items())
    small = f"<small>{html.escape(unit)}</small>" if unit else ""
    return (
        f'<div class="card{" wide" if wide else ""}" data-kind="{kind}"{values}>'
        f"<header><b>{html.escape(title)}</b>{small}</header></div>"
    )


def panel_names(run: Run, panel: Panel) -> list[str]:
    """The metrics of the panel that the run has; the layers' own names in place of `vio/L*`."""
    if panel.names[0].endswith(LAYER_SUFFIX):
        return [name for name in run.names if name.startswith(panel.names[0].removesuffix("*"))]
    have = {*run.names, *(name for row in run.maps for name in row)}
    return [name for name in panel.names if name in have]


def is_zero(run: Run, names: list[str]) -> bool:
    """Whether these scalars are 0 all the time: a line of text then says more than a picture."""
    return all(name in run.names and not any(run.curve(name).values) for name in names)


def panel_card(run: Run, panel: Panel) -> str:
    """The panel's card, or nothing if there is nothing to draw."""
    names = panel_names(run, panel)
    if not names or is_zero(run, names):
        return ""
    if panel.names[0].endswith(LAYER_SUFFIX):
        return card(panel.title, panel.unit, "layers", prefix=names[0].split("/")[0])
    if names[0].startswith("map/"):
        return card(panel.title, panel.unit, "map", names[0] == "map/expert_load", name=names[0])
    return card(panel.title, panel.unit, "curves", names=json.dumps(names))


def section_html(run: Run, section: Section) -> str:
    """The section's cards by group, and what the run has no values of."""
    parts = []
    for group in dict.fromkeys(panel.group for panel in section.panels):
        cards = "".join(panel_card(run, panel) for panel in section.panels if panel.group == group)
        heading = f"<h3>{group}</h3>" if group and cards else ""
        parts.append(f'{heading}<div class="grid">{cards}</div>' if cards else "")
    if any("map/expert_load" in row for row in run.maps) and section.title == "Routing maps":
        steps = "load / uniform load, a column for each map"
        controls = (
            '<div class="card controls"><button id="play">Play</button><input type="range" id="when" min="0" '
            'aria-label="step of the maps"><output id="when-step"></output></div>'
        )
        parts = [controls, *parts, '<h3>Over time</h3><div class="grid">']
        parts += [card("Experts of one layer", steps, "time", wide=True), "</div>"]
    for text, names in quiet_names(run, section).items():
        parts.append(f'<p class="none">{text}: {", ".join(names)}</p>' if names else "")
    return f'<section id="{anchor(section.title)}"><h2>{section.title}</h2>{"".join(parts)}</section>'


def quiet_names(run: Run, section: Section) -> dict[str, list[str]]:
    """What the section does not draw, by the reason."""
    zero, missing = [], []
    for panel in section.panels:
        names = panel_names(run, panel)
        if names and is_zero(run, names):
            zero += panel.names
        elif not names:
            missing += panel.names
        else:
            layers = panel.names[0].endswith(LAYER_SUFFIX)
            missing += [] if layers else [name for name in panel.names if name not in names]
    return {"0 all the time": zero, "No values in this run": missing}


def anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def final_values(run: Run) -> str:
    """Every metric's last value and its range; layers have a table of their own."""
    units = {name: panel.unit for section in SECTIONS for panel in section.panels for name in panel.names}
    lines = []
    for name in [name for name in run.names if "/L" not in name]:
        curve = run.curve(name)
        known = [value for value in curve.values if value is not None]
        cells = [number(curve.values[-1]), str(curve.steps[-1])]
        cells += [number(min(known)), number(max(known))] if known else ["", ""]
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(
            f'<tr><td>{name}</td>{body}<td class="text">{html.escape(units.get(name, ""))}</td></tr>'
        )
    head = "".join(f"<th>{title}</th>" for title in ("metric", "last", "at step", "lowest", "highest"))
    return (
        f'<div class="card scroll"><table><thead><tr>{head}<th class="text">unit</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>{layer_table(run)}"
    )


def layer_table(run: Run) -> str:
    columns = {"vio": "max violation", "dead": "dead experts", "drop": "share dropped"}
    layers = sorted({name.split("/")[1] for name in run.names if "/L" in name})
    if not layers:
        return ""
    lines = [
        "".join([f"<tr><td>{layer}</td>", *(f"<td>{number(run.last(f'{c}/{layer}'))}</td>" for c in columns)])
        for layer in layers
    ]
    head = "".join(f"<th>{title}</th>" for title in ("layer", *columns.values()))
    body = "</tr>".join(lines) + "</tr>"
    return (
        '<h3>By layer, last window</h3><div class="card scroll">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def configuration(run: Run) -> str:
    parts = []
    for index, (name, text) in enumerate(run.config_texts.items()):
        note = "" if index == 0 else ", of an earlier session"
        parts.append(
            f'<div class="card"><details{" open" if index == 0 else ""}><summary>{name}{note}</summary>'
            f"<pre>{html.escape(text)}</pre></details></div>"
        )
    return "".join(parts)


def build_page(run: Run) -> str:
    """The page's whole text."""
    from dsv2.model.sizes import count_parameters

    counts, step = count_parameters(run.config.model), int(run.rows[-1]["step"])
    name, state = html.escape(run.config.name), run.status.get("state", "unknown")
    of = f" of {run.status['total_steps']}" if "total_steps" in run.status else ""
    titles = [*(section.title for section in SECTIONS), "Final values", "Configuration"]
    links = "".join(f'<a href="#{anchor(title)}">{title}</a>' for title in titles)
    thinned_note = (
        f"Curves are thinned to {MOST_POINTS} points, the extremes of every stretch among them. "
        if len(run.rows) > MOST_POINTS
        else ""
    ) + (f"{MOST_MAPS} of {len(run.maps)} maps are shown. " if len(run.maps) > MOST_MAPS else "")
    # A "<" would let a text end the script element.
    data = json.dumps(page_data(run), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title><style>{(PAGE / "report.css").read_text()}</style></head>
<body><nav><div><strong>{name}</strong>{links}
<label><input type="checkbox" id="smooth" checked> smooth</label></div></nav>
<main><h1>{name}</h1><span class="badge {html.escape(state)}">{html.escape(state)}</span>
<p class="lead">step {step}{of} &middot; {fmt_count(counts.total)} parameters, {fmt_count(counts.active)}
active a token &middot; {html.escape(str(run.folder))}</p>
<noscript><p>Curves and maps need JavaScript; the tables below do not.</p></noscript>
<div class="tiles">{tiles(run)}</div>
{"".join(section_html(run, section) for section in SECTIONS)}
<section id="final-values"><h2>Final values</h2>{final_values(run)}</section>
<section id="configuration"><h2>Configuration</h2>{configuration(run)}</section>
<footer>{thinned_note}Smoothing is a mean over a sliding window; the values themselves are drawn
faintly behind it, and are what a curve shows under the mouse.</footer>
</main>
<script type="application/json" id="data">{data}</script>
<script>{(PAGE / "report.js").read_text()}</script></body></html>
"""


def write_page(run_dir: Path, out: Path) -> Path:
    """Write the page of the run in `run_dir`; return `out`.

    Raises:
        UserError: the folder is no run, or `out` cannot be written.
    """
    text = build_page(read_run(run_dir))
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    return out
