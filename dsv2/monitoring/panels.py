"""The sections that W&B's dashboard and the report's page both show, built from the metrics' declarations."""

from collections.abc import Iterable
from typing import NamedTuple

from dsv2.monitoring.metrics.base import MAP, PER_LAYER, PER_RANK, Metric, Panel, Section
from dsv2.monitoring.metrics.producers import METRICS


class Chart(NamedTuple):
    """One panel with all its metrics."""

    panel: Panel
    metrics: tuple[Metric, ...]

    @property
    def title(self) -> str:
        return self.panel.title

    @property
    def group(self) -> str:
        return self.panel.group

    @property
    def unit(self) -> str:
        return self.metrics[0].unit

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(metric.name for metric in self.metrics)

    @property
    def per_layer(self) -> bool:
        return self.names[0].endswith(PER_LAYER)

    @property
    def is_family(self) -> bool:
        """Return whether the chart has one metric per layer or per rank."""
        return self.names[0].endswith((PER_LAYER, PER_RANK))

    @property
    def is_map(self) -> bool:
        return self.names[0].startswith(MAP)


class ChartSection(NamedTuple):
    title: str
    charts: tuple[Chart, ...]


def layout(metrics: Iterable[Metric]) -> tuple[ChartSection, ...]:
    """Return the sections with the panels of these metrics, in the order of their declaration.

    Raises:
        ValueError: a panel's `after` names no panel of its section and group.
    """
    by_place: dict[tuple[str, str, str], list[Metric]] = {}
    for metric in metrics:
        if metric.panel is not None:
            by_place.setdefault(metric.panel[:3], []).append(metric)
    charts: list[Chart] = []
    for members in by_place.values():
        panel = members[0].panel
        assert panel is not None
        charts.append(Chart(panel, tuple(members)))
    placed = [chart for chart in charts if not chart.panel.after]
    for chart in charts:
        if chart.panel.after:
            before = (chart.panel.section, chart.panel.after, chart.panel.group)
            places = [other.panel[:3] for other in placed]
            placed.insert(places.index(before) + 1, chart)
    return tuple(
        ChartSection(section.value, tuple(chart for chart in placed if chart.panel.section is section))
        for section in Section
    )


SECTIONS = layout(METRICS.values())
