"""The three balance losses: raw, averaged over layers, and as they are added to the loss."""

from typing import TYPE_CHECKING

from dsv2.config.schema import BalanceConfig
from dsv2.monitoring.metrics.base import Metric, Panel, Producer, Section, When, Window

if TYPE_CHECKING:
    from dsv2.moe.balance import BalanceLosses

RAW_UNIT = "before alpha; 1 = balanced"
ADDED_UNIT = "nats per token, all layers"
ADDED = Panel(Section.training, "Balance losses in the loss", after="Gradient norm")


class Balance(Producer[Window]):
    when = When.step
    metrics = (
        Metric(
            name="moe/aux_expert",
            unit=RAW_UNIT,
            meaning="expert balance loss, mean over layers",
            panel=Panel(Section.balance, "Balance loss", group="Expert", after="Max violation by layer"),
        ),
        Metric(
            name="moe/aux_device",
            unit=RAW_UNIT,
            meaning="device balance loss, mean over layers",
            panel=Panel(Section.balance, "Balance loss", group="Device", after="Load variation"),
        ),
        Metric(
            name="moe/aux_comm",
            unit=RAW_UNIT,
            meaning="communication balance loss, mean over layers",
            panel=Panel(
                Section.balance, "Balance loss", group="Communication", after="Groups a token is sent to"
            ),
        ),
        Metric(
            name="moe/add_expert",
            unit=ADDED_UNIT,
            meaning="what the expert balance loss adds to `train/loss_total`: alpha times its sum over "
            "layers",
            panel=ADDED,
        ),
        Metric(
            name="moe/add_device",
            unit=ADDED_UNIT,
            meaning="what the device balance loss adds to `train/loss_total`",
            panel=ADDED,
        ),
        Metric(
            name="moe/add_comm",
            unit=ADDED_UNIT,
            meaning="what the communication balance loss adds to `train/loss_total`",
            panel=ADDED,
        ),
    )

    def values(self, seen: Window) -> dict[str, float]:
        return balance_values(seen.result.balance, self.config.model.balance)


def balance_values(balance: "BalanceLosses", recipe: BalanceConfig) -> dict[str, float]:
    """Return the family's values from one step's losses, [L] each."""
    return {
        "moe/aux_expert": float(balance.expert.mean()),
        "moe/aux_device": float(balance.device.mean()),
        "moe/aux_comm": float(balance.comm.mean()),
        "moe/add_expert": recipe.alpha_expert * float(balance.expert.sum()),
        "moe/add_device": recipe.alpha_device * float(balance.device.sum()),
        "moe/add_comm": recipe.alpha_comm * float(balance.comm.sum()),
    }
