"""How a metric is declared, and what computes it.

A metric is declared once, as a `Metric` in its family's file beside this one. The tables of
docs/metrics.md, W&B's dashboard, the report's page and the alerts are all built from the declarations. The
families are listed in producers.py. Neither this file nor a family's file imports torch, so that pages can
be built without it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from dsv2.config.schema import Config

if TYPE_CHECKING:
    from dsv2.moe.stats import RoutingStats
    from dsv2.parallel.mesh import Mesh
    from dsv2.training.results import StepResult
    from dsv2.training.schedule import StepPlan
    from dsv2.training.spikes import SpikeCounts

PER_RANK = "/R*"  # ends the name of a per-rank metric: work/R* stands for work/R0, work/R1, ...
PER_LAYER = "/L*"  # ends the name of a per-layer metric: vio/L* stands for vio/L01, vio/L02, ...
MAP = "map/"  # begins the name of a heat map


class When(Enum):
    """At which steps a family has values; the text is the heading of its table in docs/metrics.md."""

    step = "Every step"
    window = "Every `logging.every` steps, over that window"
    maps = "Every `logging.maps_every` steps, at the end of a window"
    evaluation = "At evaluation"
    save = "When a checkpoint is complete"


class Section(StrEnum):
    """The sections of the dashboard and the report, in their order."""

    training = "Training"
    balance = "Balance"
    maps = "Routing maps"
    performance = "Performance"


class Panel(NamedTuple):
    """Where a metric is drawn. Metrics with the same section, group and title share one panel."""

    section: Section
    title: str
    group: str = ""  # what the panel is about, within its section
    after: str = ""  # the title in the same section and group that it follows; "" puts it last
    smooth: bool = True  # False: the values have no noise, so the report draws them as they are


class Alert(NamedTuple):
    """Somebody should look at the run: the metric has stayed above a threshold.

    The first three fields name fields of the configuration's section `logging`.
    """

    title: str
    threshold: str  # 0 or null turns the alert off
    lasting: str  # for how many values in a row
    meaning: str
    text_format: str = "{:.2f}"  # of the value and the threshold
    share_of_experts: bool = False  # the threshold is a share of all layers' routed experts
    rank: str = ""  # the metric with the number of the rank that is to blame, in all of the values in a row
    spike: bool = False  # the threshold counts standard deviations above the metric's running mean


class Metric(NamedTuple):
    """One number per step, window or evaluation; `vio/L*` is one per MoE layer, `work/R*` one per rank."""

    name: str
    unit: str
    meaning: str
    panel: Panel | None = None
    alert: Alert | None = None


class RankTimes(NamedTuple):
    """Seconds that one rank has spent."""

    work: float = 0.0  # in forward passes, without waiting for the experts' exchange
    data: float = 0.0  # fetching data
    step: float = 0.0  # in whole steps

    def plus(self, other: "RankTimes") -> "RankTimes":
        return RankTimes(self.work + other.work, self.data + other.data, self.step + other.step)


class Window(NamedTuple):
    """The steps since the last window's end, as one rank has seen them."""

    steps: int
    plan: "StepPlan"  # of the last step
    result: "StepResult"  # of the last step
    seconds: float  # of the last step
    data_seconds: float  # of these seconds, waiting for data
    stats: "RoutingStats"  # this rank's sums over the window's steps
    wait_ms: float  # this rank's waiting for the experts' exchange, over the window's steps
    times: "RankTimes"  # this rank's, over the window's steps
    spikes: "SpikeCounts | None" = None  # None with spike.policy=off


Seen = TypeVar("Seen")  # a Window, an Evaluation or a Saved


class Producer(ABC, Generic[Seen]):
    """A family of metrics: `metrics` declares them, `values` computes them. Every rank has one."""

    when: ClassVar[When]
    metrics: ClassVar[tuple[Metric, ...]]

    def __init__(self, config: Config, mesh: "Mesh") -> None:
        self.config = config
        self.mesh = mesh

    @abstractmethod
    def values(self, seen: Seen) -> Mapping[str, Any]:
        """Return a float or a NumPy array per name, the same names on every rank. Collective."""
