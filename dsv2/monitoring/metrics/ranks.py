"""Which ranks are slow: every rank's own times, and the slowest rank compared with the others.

All ranks of a job step together, so a step takes the same time everywhere. A rank's own time leaves out what
it waits for others. It is the time to fetch data, and the forward passes without the experts' exchange.
"""

from statistics import median

from dsv2.monitoring.metrics.base import Alert, Metric, Panel, Producer, RankTimes, Section, When, Window
from dsv2.parallel.plan import Dim

GROUP = "Ranks"
MOST = 64  # ranks; a larger job has no metrics per rank


class Ranks(Producer[Window]):
    when = When.window
    metrics = (
        Metric(
            name="ranks/slow",
            unit="slowest / median of the others",
            meaning="the own time of the slowest rank: fetching data, and forward passes without waiting",
            panel=Panel(Section.performance, "Slowest rank", group=GROUP),
            alert=Alert(
                title="slow rank",
                threshold="alert_slow_rank",
                lasting="alert_windows",
                meaning="`ranks/slow` is above `alert_slow_rank` for `alert_windows` windows in a row, "
                "with the same slowest rank; the alert names the rank and its host",
                rank="ranks/slowest",
            ),
        ),
        Metric(
            name="ranks/slowest",
            unit="rank",
            meaning="the rank with the longest own time",
            panel=Panel(Section.performance, "Which rank is slowest", group=GROUP, smooth=False),
        ),
        Metric(
            name="work/R*",
            unit="seconds per step",
            meaning=f"forward passes without waiting for other ranks; by rank, in jobs of at most {MOST}",
            panel=Panel(Section.performance, "Forward by rank", group=GROUP),
        ),
        Metric(
            name="data/R*",
            unit="seconds per step",
            meaning="fetching data; by rank",
            panel=Panel(Section.performance, "Data by rank", group=GROUP),
        ),
        Metric(
            name="step/R*",
            unit="seconds",
            meaning="a whole step; by rank",
            panel=Panel(Section.performance, "Step by rank", group=GROUP),
        ),
    )

    def values(self, seen: Window) -> dict[str, float]:
        everyone = self.mesh[Dim.world]
        if everyone.size == 1:
            return {}
        own = seen.stats.load_E.new_tensor(seen.times)
        times = [RankTimes(*(value / seen.steps for value in row)) for row in everyone.gather(own).tolist()]
        return rank_values(times)


def rank_values(times: list[RankTimes]) -> dict[str, float]:
    """Return the family's values; `times` are the seconds per step of each of at least two ranks."""
    own = [time.work + time.data for time in times]
    slowest = max(range(len(own)), key=own.__getitem__)
    others = median(own[:slowest] + own[slowest + 1 :])
    values = {"ranks/slow": own[slowest] / others if others else 1.0, "ranks/slowest": float(slowest)}
    if len(times) <= MOST:
        for rank, time in enumerate(times):
            values |= {f"work/R{rank}": time.work, f"data/R{rank}": time.data, f"step/R{rank}": time.step}
    return values
