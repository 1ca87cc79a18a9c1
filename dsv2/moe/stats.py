"""Routing statistics: sums over tokens, so that they add up over micro-batches, layers and ranks.

Shapes: T tokens, E routed experts, K experts a token, G groups, L MoE layers. Every ratio is taken
once, in dsv2/metrics.py, after all sums are complete.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsv2.moe.dispatch import Exchange
from dsv2.moe.router import Routing, tokens_sent_TG


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
    routing: Routing, keep_TK: Tensor | None, n_group: int, exchange: Exchange | None = None
) -> RoutingStats:
    """Statistics of one layer's routing of T tokens."""
    n_experts = routing.affinity_TE.shape[1]
    ids_P = routing.expert_ids_TK.flatten()
    load_E = torch.bincount(ids_P, minlength=n_experts).double()
    if keep_TK is None:
        dropped_E = torch.zeros_like(load_E)
    else:
        dropped_E = torch.bincount(ids_P, weights=(~keep_TK).flatten().double(), minlength=n_experts)
    affinity_TE = routing.affinity_TE

    def number(value: int) -> Tensor:
        return torch.full((), float(value), dtype=torch.float64, device=load_E.device)

    return RoutingStats(
        tokens=number(len(affinity_TE)),
        load_E=load_E,
        dropped_E=dropped_E,
        sent_G=tokens_sent_TG(routing.expert_ids_TK, n_experts, n_group).sum(dim=0).double(),
        token_entropy=torch.special.entr(affinity_TE).sum(dtype=torch.float64),
        top1=routing.weights_TK[:, 0].sum(dtype=torch.float64),
        rows_out=number(exchange.rows_out if exchange else 0),
        rows_in=number(exchange.rows_in if exchange else 0),
    )
