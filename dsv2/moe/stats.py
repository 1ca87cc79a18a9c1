"""Routing statistics: sums over tokens, which can be summed over micro-batches, steps and ranks.

dsv2/monitoring takes every ratio once, after all sums are complete.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsv2.kernels.types import SequenceSums
from dsv2.moe.dispatch import Exchange


class RoutingStats(NamedTuple):
    """Sums over tokens, fp64 (exact for counts). Stacked over the MoE layers they have a leading L."""

    tokens: Tensor  # [] count
    load_E: Tensor  # pairs that select the expert, before dropping
    dropped_E: Tensor  # pairs of the expert that were dropped
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
        kept_E: how many pairs of each expert were kept.
    """
    n_sequences, n_experts = sums.selected_BE.shape
    # One reduction instead of four.
    columns = (sums.selected_BE, sums.sent_BG, sums.entropy_B.unsqueeze(1), sums.top1_B.unsqueeze(1))
    totals = torch.cat(columns, dim=1).sum(dim=0, dtype=torch.float64)
    load_E, sent_G, (entropy, top1) = totals.split([n_experts, sums.sent_BG.shape[1], 2])

    def number(value: int) -> Tensor:
        return torch.full((), float(value), dtype=torch.float64, device=load_E.device)

    return RoutingStats(
        tokens=number(n_sequences * n_tokens),
        load_E=load_E,
        dropped_E=load_E - kept_E,
        sent_G=sent_G,
        token_entropy=entropy,
        top1=top1,
        rows_out=number(exchange.rows_out if exchange else 0),
        rows_in=number(exchange.rows_in if exchange else 0),
    )
