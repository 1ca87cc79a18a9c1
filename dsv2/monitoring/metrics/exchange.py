"""What the experts' exchange between ranks costs; no values while every expert is on its tokens' rank."""

from typing import TYPE_CHECKING

from dsv2.config.schema import Precision
from dsv2.monitoring.metrics.base import Metric, Panel, Producer, Section, When, Window
from dsv2.monitoring.metrics.routing import max_over_mean
from dsv2.parallel.plan import Dim

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "Communication"
RECEIVED_AND_SENT = Panel(Section.balance, "Received and sent", group=GROUP)


class Exchange(Producer[Window]):
    when = When.window
    metrics = (
        Metric(
            name="comm/send_max_mean",
            unit="max / mean",
            meaning="rows sent to other ranks, over ranks, mean over layers",
            panel=RECEIVED_AND_SENT,
        ),
        Metric(
            name="comm/in_max_mean",
            unit="max / mean",
            meaning="rows received from other ranks, over ranks, mean over layers",
            panel=RECEIVED_AND_SENT,
        ),
        Metric(
            name="comm/gib",
            unit="GiB per step and rank",
            meaning="sent to other ranks, forward and backward, mean over ranks",
            panel=Panel(Section.balance, "Sent", group=GROUP),
        ),
        Metric(
            name="comm/a2a_ms",
            unit="ms per step",
            meaning="time that a rank waits for the experts' exchange, mean over ranks",
            panel=Panel(Section.balance, "Waiting for the exchange", group=GROUP),
        ),
    )

    def values(self, seen: Window) -> dict[str, float]:
        from dsv2.moe.traffic import bytes_per_row

        model = self.config.model
        runtime = self.config.runtime
        row = bytes_per_row(
            hidden_size=model.hidden_size,
            top_k=model.num_experts_per_tok,
            element_bytes=2 if runtime.precision is Precision.bf16 else 4,
            recompute=runtime.recompute,
        )
        wait_ms = seen.stats.rows_out.new_tensor(seen.wait_ms)
        return exchange_values(
            # A stage counts its own layers.
            rows_out_WL=self.mesh[Dim.dp].gather(self.mesh[Dim.pp].sum(seen.stats.rows_out)),
            rows_in_WL=self.mesh[Dim.dp].gather(self.mesh[Dim.pp].sum(seen.stats.rows_in)),
            wait_ms_W=self.mesh[Dim.world].gather(wait_ms),
            row_bytes=row,
            steps=seen.steps,
        )


def exchange_values(
    *, rows_out_WL: "Tensor", rows_in_WL: "Tensor", wait_ms_W: "Tensor", row_bytes: float, steps: int
) -> dict[str, float]:
    """Return the family's values of a window of `steps` steps; {} if no row went to another rank.

    Args:
        rows_out_WL: rows sent to other ranks.
        rows_in_WL: rows received from other ranks.
        wait_ms_W: milliseconds of waiting for the exchange.
        row_bytes: see `bytes_per_row`.
        steps: how many the window has.
    """
    if rows_out_WL.sum() == 0:
        return {}
    return {
        # nanmean: a layer whose tokens all stay on their rank has no ratio.
        "comm/send_max_mean": float(max_over_mean(rows_out_WL.T).nanmean()),
        "comm/in_max_mean": float(max_over_mean(rows_in_WL.T).nanmean()),
        "comm/gib": float(rows_out_WL.sum(dim=1).mean()) * row_bytes / steps / 2**30,
        "comm/a2a_ms": float(wait_ms_W.mean()) / steps,
    }
