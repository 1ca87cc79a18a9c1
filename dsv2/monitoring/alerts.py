"""When somebody should look at a run: routing that collapses, a loss that jumps (see LoggingConfig)."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from dsv2.config.schema import LoggingConfig

HORIZON = 100  # steps over which the loss's running mean and deviation forget
_FEWEST = 30  # steps of a loss before its deviation says anything


class Alert(NamedTuple):
    title: str
    text: str


class Alerts:
    """Looks at every step's metrics; each kind of alert comes once an episode.

    An episode lasts as long as its value stays over the threshold. What alerts know starts anew with
    every session of a run.
    """

    def __init__(self, config: LoggingConfig, routed_experts: int) -> None:
        """`routed_experts`: of all layers together."""
        self._config = config
        self._routed_experts = routed_experts
        self._windows = {"moe/max_vio_max": 0, "moe/dead": 0}  # in a row, over the threshold
        self._loss = RunningStatistics()
        self._steps_above = 0

    def check(self, step: int, metrics: Mapping[str, float]) -> list[Alert]:
        """The alerts that begin with this step.

        Args:
            step: counted from 1.
            metrics: the step's, by their names; routing metrics come at the ends of windows only.
        """
        config = self._config
        found = [
            self._collapse(step, metrics, "moe/max_vio_max", config.alert_max_vio or math.inf, "{:.2f}"),
            self._collapse(
                step, metrics, "moe/dead", (config.alert_dead or math.inf) * self._routed_experts, "{:.0f}"
            ),
            self._spike(step, metrics["train/loss"]),
        ]
        return [alert for alert in found if alert is not None]

    def _collapse(
        self, step: int, metrics: Mapping[str, float], name: str, threshold: float, form: str
    ) -> Alert | None:
        if name not in metrics:
            return None
        self._windows[name] = self._windows[name] + 1 if metrics[name] > threshold else 0
        if self._windows[name] != self._config.alert_windows:
            return None
        return Alert(
            "routing collapse",
            f"step {step}: {name} is {form.format(metrics[name])}, over {form.format(threshold)} "
            f"for {self._config.alert_windows} windows in a row",
        )

    def _spike(self, step: int, loss: float) -> Alert | None:
        """Steps above the threshold are not part of what they are measured against.

        A loss that stays up for `HORIZON` steps has found a new level: its statistics begin again there.
        """
        seen, deviations = self._loss, self._config.alert_spike
        if not deviations:
            return None
        threshold = seen.mean + deviations * seen.deviation
        if seen.count < _FEWEST or loss <= threshold:
            seen.add(loss)
            self._steps_above = 0
            return None
        self._steps_above += 1
        steps_above = self._steps_above
        if steps_above >= max(HORIZON, self._config.alert_spike_steps):
            self._loss, self._steps_above = RunningStatistics(), 0
        if steps_above != self._config.alert_spike_steps:
            return None
        return Alert(
            "loss spike",
            f"step {step}: the loss is {loss:.3f}, over {threshold:.3f} for {steps_above} steps in a row; "
            f"its running mean is {seen.mean:.3f}, its standard deviation {seen.deviation:.3f}",
        )


class RunningStatistics:
    """Mean and standard deviation: exact over the first `HORIZON` values, then forgetting exponentially."""

    def __init__(self) -> None:
        self.count, self.mean, self._variance = 0, 0.0, 0.0

    @property
    def deviation(self) -> float:
        return math.sqrt(self._variance)

    def add(self, value: float) -> None:
        self.count += 1
        weight = 1 / min(self.count, HORIZON)
        distance = value - self.mean
        self.mean += weight * distance
        self._variance = (1 - weight) * (self._variance + weight * distance**2)
