"""Routing statistics: sums over tokens, to be summed further over micro-batches, steps and ranks.

dsv2/monitoring computes every ratio once, after all sums are complete.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsv2.kernels.types import SequenceSums
from dsv2.moe.dispatch import Exchange


class RoutingStats(NamedTuple):
    """Sums over tokens, fp64 (exact for counts). After `stack` every tensor has a leading L."""

    tokens: Tensor  # [] number of tokens
    load_E: Tensor  # tokens that select the expert, before dropping
    dropped_E: Tensor  # dropped pairs of the expert
    sent_G: Tensor  # tokens sent to the group, before dropping
    token_entropy: Tensor  # [] sum over tokens of the affinity's entropy, nats
    top1: Tensor  # [] sum over tokens of the highest affinity
    rows_out: Tensor  # [] rows that this rank sent to other ranks of its EP group
    rows_in: Tensor  # [] rows that this rank received from other ranks of its EP group

    def plus(self, other: "RoutingStats") -> "RoutingStats":
        """Return the sums over both sets of tokens."""
        return RoutingStats(*(a + b for a, b in zip(self, other, strict=True)))

    @staticmethod
    def stack(layers: "list[RoutingStats]") -> "RoutingStats":
        """Return one RoutingStats whose tensors have a leading layer dimension."""
        return RoutingStats(*(torch.stack(parts) for parts in zip(*layers, strict=True)))


@torch.no_grad()
def routing_stats(
    sums: SequenceSums, n_tokens: int, kept_E: Tensor, exchange: Exchange | None = None
) -> RoutingStats:
    """Return one layer's statistics for sequences of `n_tokens` tokens each.

    Args:
        kept_E: the number of kept pairs per expert.
    """
    n_sequences, n_experts = sums.selected_BE.shape
    # The concatenation needs one reduction instead of four.
    columns = (sums.selected_BE, sums.sent_BG, sums.entropy_B.unsqueeze(1), sums.top1_B.unsqueeze(1))
    totals = torch.cat(columns, dim=1).sum(dim=0, dtype=torch.float64)
    load_E, sent_G, (entropy, top1) = totals.split([n_experts, sums.sent_BG.shape[1], 2])

    def scalar(value: int) -> Tensor:
        return torch.full((), float(value), dtype=torch.float64, device=load_E.device)

    return RoutingStats(
        tokens=scalar(n_sequences * n_tokens),
        load_E=load_E,
        dropped_E=load_E - kept_E,
        sent_G=sent_G,
        token_entropy=entropy,
        top1=top1,
        rows_out=scalar(exchange.rows_out if exchange else 0),
        rows_in=scalar(exchange.rows_in if exchange else 0),
    )
