"""What a step optimizes: loss, gradient norm, learning rate, batch."""

from dsv2.monitoring.metrics.base import Alert, Metric, Panel, Producer, Section, When, Window

LOSS = Panel(Section.training, "Loss")


class Training(Producer[Window]):
    when = When.step
    metrics = (
        Metric(
            name="train/loss_lm",
            unit="nats per token",
            meaning="cross-entropy alone, mean over the global batch; the `loss` of the console's step lines",
            panel=LOSS,
        ),
        Metric(
            name="train/loss_total",
            unit="nats per token",
            meaning="the minimized loss: cross-entropy plus the balance losses times their alphas; "
            "`train/loss` in runs of earlier versions",
            panel=Panel(Section.training, "Total loss", after="Loss"),
            alert=Alert(
                title="loss spike",
                threshold="alert_spike",
                lasting="alert_spike_steps",
                meaning="`train/loss_total` exceeds its running mean (over about 100 steps) by `alert_spike` "
                "running standard deviations, for `alert_spike_steps` steps in a row; not in a session's "
                "first 30 steps",
                text_format="{:.3f}",
                spike=True,
            ),
        ),
        Metric(
            name="train/grad_norm",
            unit="before clipping",
            meaning="global norm of the gradient",
            panel=Panel(Section.training, "Gradient norm"),
        ),
        Metric(
            name="train/lr",
            unit="",
            meaning="learning rate of this step",
            panel=Panel(Section.training, "Learning rate", smooth=False),
        ),
        Metric(
            name="train/batch_seqs",
            unit="sequences",
            meaning="global batch",
            panel=Panel(Section.training, "Batch", smooth=False),
        ),
        Metric(
            name="train/tokens",
            unit="tokens",
            meaning="seen since the start, this step included",
            panel=Panel(Section.training, "Seen", smooth=False),
        ),
        Metric(
            name="spike/skipped",
            unit="times",
            meaning="a step had no update, since the start; only with `spike.policy=skip` or `rewind`",
            panel=Panel(Section.training, "Loss spikes", smooth=False),
        ),
        Metric(
            name="spike/rewinds",
            unit="times",
            meaning="returns to a checkpoint, since the start; only with `spike.policy=skip` or `rewind`",
            panel=Panel(Section.training, "Loss spikes", smooth=False),
        ),
    )

    def values(self, seen: Window) -> dict[str, float]:
        values = {
            "train/loss_lm": seen.result.lm_loss,
            "train/loss_total": seen.result.loss,
            "train/grad_norm": seen.result.grad_norm,
            "train/lr": seen.plan.lr,
            "train/batch_seqs": float(seen.plan.batch_size),
            "train/tokens": float(seen.plan.tokens_after),
        }
        if seen.spikes is not None:
            values["spike/skipped"] = float(seen.spikes.skipped)
            values["spike/rewinds"] = float(seen.spikes.rewinds)
        return values
