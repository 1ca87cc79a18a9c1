"""Routing statistics: sums over tokens, so that they add up over micro-batches, layers and ranks.

Shapes: T tokens, E routed experts, K experts a token, G groups, L MoE layers. Every ratio is taken
once, in dsv2/monitoring/metrics.py, after all sums are complete.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsv2.kernels.reference.router import SequenceSums
from dsv2.moe.dispatch import Exchange


class RoutingStats(NamedTuple):
    """Sums over the tokens seen, fp64 (exact for counts); a leading L where layers are stacked."""

    tokens: Tensor  # []
    load_E: Tensor  # pairs that select the expert, before dropping
    dropped_E: Tensor  # of them, those dropped
    sent_G: Tensor  # tokens sent to the group, before dropping
    token_entropy: Tensor  # [] sum over tokens of the affinity's entropy, nats
    top1: Tensor  # [] sum over tokens of the highest affinity
    rows_out: Tensor  # [] rows that this rank sent to other ranks of its EP group
    rows_in: Tensor  # [] rows that it received from them

    def plus(self, other: "RoutingStats") -> "RoutingStats":
        """The sums over both sets of tokens."""
        return RoutingStats(*(a + b for a, b in zip(self, other, strict=True)))

    @staticmethod
    def stack(layers: "list[RoutingStats]") -> "RoutingStats":
        """One RoutingStats whose tensors have a leading layer dimension."""
        return RoutingStats(*(torch.stack(parts) for parts in zip(*layers, strict=True)))


@torch.no_grad()
def routing_stats(
    sums: SequenceSums, n_tokens: int, kept_E: Tensor, exchange: Exchange | None = None
) -> RoutingStats:
    """Statistics of one layer's routing of sequences of `n_tokens` tokens; `kept_E` pairs were kept."""
    n_sequences, n_experts = sums.selected_BE.shape
    numbers_B1 = (sums.entropy_B.unsqueeze(1), sums.top1_B.unsqueeze(1))
    together_BN = torch.cat((sums.selected_BE, sums.sent_BG, *numbers_B1), dim=1)
    total_N = together_BN.sum(dim=0, dtype=torch.float64)
    load_E, sent_G, (entropy, top1) = total_N.split([n_experts, sums.sent_BG.shape[1], 2])

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
