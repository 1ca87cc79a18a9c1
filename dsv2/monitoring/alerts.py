"""Alerts that ask somebody to look at a run: a metric has stayed above the threshold that it declares.

The thresholds are fields of the configuration's section `logging`. Each alert is raised once per episode,
which lasts as long as the value stays above the threshold. A session starts without memory of earlier ones.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dsv2.config.schema import LoggingConfig
from dsv2.monitoring.metrics.base import Alert, Metric
from dsv2.monitoring.metrics.producers import METRICS
from dsv2.training.spikes import HORIZON, RunningStatistics


class Notice(NamedTuple):
    """One raised alert."""

    title: str
    text: str


class Alerts:
    """Checks every step's metrics against the declared alerts."""

    def __init__(
        self,
        config: LoggingConfig,
        routed_experts: int,
        metrics: Iterable[Metric] = METRICS.values(),
        hosts: Sequence[str] = (),
    ) -> None:
        """Watch the metrics that declare an alert.

        Args:
            config: the thresholds.
            routed_experts: of all layers.
            metrics: all that are declared.
            hosts: of each rank, for alerts that name one.
        """
        self._watches: list[_Watch] = []
        for metric in metrics:
            alert = metric.alert
            threshold = getattr(config, alert.threshold) if alert else None
            if alert is None or not threshold:
                continue
            lasting = getattr(config, alert.lasting)
            if alert.spike:
                self._watches.append(_SpikeWatch(metric.name, alert, threshold, lasting))
            else:
                scale = routed_experts if alert.share_of_experts else 1
                watch = _ThresholdWatch(metric.name, alert, threshold * scale, lasting)
                self._watches.append(watch.blaming(hosts))

    def check(self, step: int, metrics: Mapping[str, float]) -> list[Notice]:
        """Return the alerts that begin with this step.

        Args:
            step: counted from 1.
            metrics: this step's values; window metrics are present only at the end of a window.
        """
        notices = [watch.check(step, metrics) for watch in self._watches if watch.name in metrics]
        return [notice for notice in notices if notice is not None]


class _Watch(ABC):
    """Follows one metric."""

    def __init__(self, name: str, alert: Alert, threshold: float, lasting: int) -> None:
        self.name = name
        self.alert = alert
        self.threshold = threshold
        self.lasting = lasting
        self.above = 0  # values in a row above the threshold

    @abstractmethod
    def check(self, step: int, metrics: Mapping[str, float]) -> Notice | None:
        """Take in one more value, which is present."""


class _ThresholdWatch(_Watch):
    """Above a fixed threshold, and because of the same rank if the alert blames one."""

    _hosts: Sequence[str] = ()
    _rank = -1  # to blame for the last value

    def blaming(self, hosts: Sequence[str]) -> "_ThresholdWatch":
        """Let the alert name the host of the rank that is to blame."""
        self._hosts = hosts
        return self

    def check(self, step: int, metrics: Mapping[str, float]) -> Notice | None:
        value = metrics[self.name]
        rank = int(metrics[self.alert.rank]) if self.alert.rank else -1
        if rank != self._rank:
            self.above = 0
        self._rank = rank
        self.above = self.above + 1 if value > self.threshold else 0
        if self.above != self.lasting:
            return None
        shown = self.alert.text_format.format
        culprit = f": rank {rank} on {self._hosts[rank]}" if self.alert.rank else ""
        return Notice(
            self.alert.title,
            f"step {step}: {self.name} is {shown(value)}, over {shown(self.threshold)} "
            f"for {self.lasting} windows in a row{culprit}",
        )


class _SpikeWatch(_Watch):
    """Above the running mean by a number of running standard deviations.

    Values above that threshold do not enter the statistics. After `HORIZON` such values in a row the metric
    has found a new level, and the statistics start again there.
    """

    def __init__(self, name: str, alert: Alert, threshold: float, lasting: int) -> None:
        super().__init__(name, alert, threshold, lasting)
        self._seen = RunningStatistics()

    def check(self, step: int, metrics: Mapping[str, float]) -> Notice | None:
        value = metrics[self.name]
        seen = self._seen
        limit = seen.limit(self.threshold)
        if value <= limit:
            seen.add(value)
            self.above = 0
            return None
        self.above += 1
        above = self.above
        if above >= max(HORIZON, self.lasting):
            self._seen = RunningStatistics()
            self.above = 0
        if above != self.lasting:
            return None
        shown = self.alert.text_format.format
        return Notice(
            self.alert.title,
            f"step {step}: {self.name} is {shown(value)}, over {shown(limit)} for {above} steps in a row; "
            f"its running mean is {shown(seen.mean)}, its standard deviation {shown(seen.deviation)}",
        )
