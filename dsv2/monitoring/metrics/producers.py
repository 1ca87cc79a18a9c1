"""The registry of the families of metrics, in the order in which their panels appear."""

from typing import Any

from dsv2.monitoring.metrics.balance import Balance
from dsv2.monitoring.metrics.base import Metric, Producer
from dsv2.monitoring.metrics.exchange import Exchange
from dsv2.monitoring.metrics.performance import Performance, Saving
from dsv2.monitoring.metrics.ranks import Ranks
from dsv2.monitoring.metrics.routing import Routing, RoutingMaps
from dsv2.monitoring.metrics.training import Training
from dsv2.monitoring.metrics.validation import Validation

PRODUCERS: tuple[type[Producer[Any]], ...] = (
    Training,
    Routing,
    RoutingMaps,
    Exchange,
    Balance,
    Performance,
    Ranks,
    Saving,
    Validation,
)
METRICS: dict[str, Metric] = {metric.name: metric for producer in PRODUCERS for metric in producer.metrics}
