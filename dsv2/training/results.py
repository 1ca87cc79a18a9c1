"""What a training step returns."""

from typing import NamedTuple

from dsv2.moe.balance import BalanceLosses
from dsv2.moe.stats import RoutingStats


class StepResult(NamedTuple):
    """Means over the global batch, the same on every rank; statistics and times are this rank's."""

    loss: float  # lm_loss + weighted balance losses
    lm_loss: float  # nats per token
    balance: BalanceLosses  # raw, [L] each
    grad_norm: float  # before clipping
    stats: RoutingStats  # sums
    wait_ms: float  # waiting for the experts' exchanges, since the previous step's result
    work_ms: float  # forward passes without that waiting
    data_s: float  # fetching the step's data
    seconds: float  # from the batches to the updated weights
    updated: bool = True  # False: the loss was a spike, and weights and states are as before
