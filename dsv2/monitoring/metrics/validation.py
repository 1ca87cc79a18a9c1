"""The loss on the validation set."""

from typing import TYPE_CHECKING

from dsv2.monitoring.metrics.base import Metric, Panel, Producer, Section, When

if TYPE_CHECKING:
    from dsv2.training.evaluate import Evaluation


class Validation(Producer["Evaluation"]):
    when = When.evaluation
    metrics = (
        Metric(
            name="val/loss",
            unit="nats per token",
            meaning="cross-entropy alone, on the first `eval.sequences` validation sequences; nothing is "
            "dropped",
            panel=Panel(Section.training, "Loss"),
        ),
        Metric(
            name="val/bpb",
            unit="bits per byte",
            meaning="the same per UTF-8 byte of the predicted text: comparable across tokenizers",
            panel=Panel(Section.training, "Validation", after="Loss"),
        ),
    )

    def values(self, seen: "Evaluation") -> dict[str, float]:
        return {"val/loss": seen.loss, "val/bpb": seen.bpb}
