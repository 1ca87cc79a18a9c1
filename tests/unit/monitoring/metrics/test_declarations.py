"""The declarations of all metrics: consistent among themselves, and printed in docs/metrics.md.

To write the tables there after a change, set UPDATE_DOCS=1 and run this file.
"""

import os
import re
import subprocess
import sys

import pytest

from dsv2.config.schema import LoggingConfig
from dsv2.monitoring.metrics.base import PER_LAYER, Metric, Panel, Section, When
from dsv2.monitoring.metrics.producers import METRICS, PRODUCERS
from dsv2.monitoring.panels import SECTIONS, layout
from tests.unit.helpers import REPO

DOCS = REPO / "docs/metrics.md"


def metric_table(when: When) -> str:
    rows = [
        f"| `{metric.name}` | {metric.unit} | {metric.meaning} |"
        for producer in PRODUCERS
        if producer.when is when
        for metric in producer.metrics
    ]
    return "\n".join(["| name | unit | meaning |", "|---|---|---|", *rows])


def alert_table() -> str:
    defaults = LoggingConfig()
    rows = []
    for alert in [metric.alert for metric in METRICS.values() if metric.alert]:
        fields = [f"`logging.{name}={getattr(defaults, name)}`" for name in (alert.threshold, alert.lasting)]
        rows.append(f"| {alert.title} | {alert.meaning} | {', '.join(fields)} |")
    return "\n".join(["| alert | when | fields and defaults |", "|---|---|---|", *rows])


def with_tables(text: str) -> str:
    """Return the page with the tables between its marks replaced by the declarations'."""
    tables = {when.name: metric_table(when) for when in When} | {"alerts": alert_table()}
    for name, table in tables.items():
        block = f"<!-- table: {name} -->\n{table}\n<!-- end -->"
        text, count = re.subn(
            rf"<!-- table: {name} -->\n.*?<!-- end -->", lambda _, block=block: block, text, flags=re.DOTALL
        )
        assert count == 1, f"docs/metrics.md: one table is marked `{name}`"
    return text


def test_the_page_has_the_declarations_tables():
    text = DOCS.read_text()
    want = with_tables(text)
    if os.environ.get("UPDATE_DOCS"):
        DOCS.write_text(want)
        text = want
    assert text == want, "see UPDATE_DOCS in this file's header"


def test_every_table_stands_below_its_heading():
    text = DOCS.read_text()
    for when in When:
        assert f"## {when.value}\n<!-- table: {when.name} -->\n" in text


def test_a_name_is_declared_once():
    names = [metric.name for producer in PRODUCERS for metric in producer.metrics]
    assert len(names) == len(set(names)) == len(METRICS)
    assert {"train/loss_total", "moe/aux_comm", "vio/L*", "drop/L*", "map/dev_recv", "val/bpb"} <= set(names)
    assert all(re.fullmatch(r"[a-z]+/(\w+|[LR]\*)", name) for name in names)
    assert all(metric.meaning for metric in METRICS.values())


def test_an_alert_names_fields_of_the_configuration():
    alerts = [metric.alert for metric in METRICS.values() if metric.alert]
    assert len(alerts) >= 3
    for alert in alerts:
        assert hasattr(LoggingConfig(), alert.threshold)
        assert isinstance(getattr(LoggingConfig(), alert.lasting), int)


def test_the_metrics_of_a_panel_fit_together():
    """One axis: one unit. A per-layer metric or a map has its own panel."""
    for section in SECTIONS:
        for chart in section.charts:
            assert {metric.unit for metric in chart.metrics} == {chart.unit}, chart.names
            assert {metric.panel for metric in chart.metrics} == {chart.panel}, chart.names
            assert len(chart.names) == 1 or not (chart.per_layer or chart.is_map)
            assert [name.endswith(PER_LAYER) for name in chart.names] == [chart.per_layer] * len(chart.names)


def test_the_order_of_the_sections_and_of_some_panels():
    titles = {section.title: [chart.title for chart in section.charts] for section in SECTIONS}
    assert list(titles) == ["Training", "Balance", "Routing maps", "Performance"]
    known = [
        "Loss", "Validation", "Total loss", "Gradient norm", "Balance losses in the loss", "Learning rate",
        "Batch", "Seen",
    ]  # fmt: skip
    assert [title for title in titles["Training"] if title in known] == known
    known = ["Max violation", "Max violation by layer", "Balance loss", "Entropy", "Top-1 affinity"]
    assert [title for title in titles["Balance"] if title in known][:5] == known
    assert list(dict.fromkeys(chart.group for chart in SECTIONS[1].charts)) == [
        "Expert", "Device", "Communication",
    ]  # fmt: skip


def test_a_panel_may_follow_another_one():
    first = Metric("a/one", "", "x", Panel(Section.training, "One"))
    second = Metric("a/two", "", "x", Panel(Section.training, "Two"))
    between = Metric("a/three", "", "x", Panel(Section.training, "Three", after="One"))
    beside = Metric("a/four", "", "x", Panel(Section.training, "One"))
    charts = layout([first, second, between, beside])[0].charts
    assert [chart.names for chart in charts] == [("a/one", "a/four"), ("a/three",), ("a/two",)]
    with pytest.raises(ValueError, match="not in list"):
        layout([Metric("a/lost", "", "x", Panel(Section.training, "Lost", after="Nowhere"))])


def test_the_declarations_need_no_torch():
    code = "import sys, dsv2.monitoring.panels; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
