"""Routing statistics: sums over tokens, to be summed further over micro-batches, steps and ranks.

dsv2/monitoring computes every ratio once, after all sums are complete.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsv2.kernels.types import SequenceSums


class LayerRouting(NamedTuple):
    """What one MoE layer reports about one micro-batch: all that its losses and statistics need."""

    sums: SequenceSums
    kept_E: Tensor  # int64: pairs per expert, without the dropped pairs
    rows_out: int  # rows that this rank sent to other ranks of its EP group
    rows_in: int  # rows that this rank received from other ranks of its EP group


def stack_sums(layers: list[LayerRouting]) -> SequenceSums:
    """Return the layers' sums, each with a leading layer dimension. Losses of all layers take one pass."""
    sums = zip(*(layer.sums for layer in layers), strict=True)
    return SequenceSums(*(torch.stack(parts) for parts in sums))


class RoutingStats(NamedTuple):
    """Sums over tokens of L layers, fp64 (exact for counts)."""

    tokens: Tensor  # [L] number of tokens
    load_E: Tensor  # [L, E] tokens that select the expert, before dropping
    dropped_E: Tensor  # [L, E] dropped pairs of the expert
    sent_G: Tensor  # [L, G] tokens sent to the group, before dropping
    token_entropy: Tensor  # [L] sum over tokens of the affinity's entropy, nats
    top1: Tensor  # [L] sum over tokens of the highest affinity
    rows_out: Tensor  # [L] rows that this rank sent to other ranks of its EP group
    rows_in: Tensor  # [L] rows that this rank received from other ranks of its EP group

    def plus(self, other: "RoutingStats") -> "RoutingStats":
        """Return the sums over both sets of tokens."""
        return RoutingStats(*(a + b for a, b in zip(self, other, strict=True)))


@torch.no_grad()
def routing_stats(layers: list[LayerRouting], sums: SequenceSums, n_tokens: int) -> RoutingStats:
    """Return the layers' statistics.

    Args:
        sums: the layers' sums as `stack_sums` returns them.
        n_tokens: of each sequence.
    """
    n_layers, n_sequences, n_experts = sums.selected_BE.shape
    # The concatenation needs one reduction instead of four.
    columns = (sums.selected_BE, sums.sent_BG, sums.entropy_B.unsqueeze(-1), sums.top1_B.unsqueeze(-1))
    totals = torch.cat(columns, dim=-1).sum(dim=1, dtype=torch.float64)
    load_LE, sent_LG, entropy_L1, top1_L1 = totals.split([n_experts, sums.sent_BG.shape[-1], 1, 1], dim=-1)
    known = [[float(n_sequences * n_tokens), float(layer.rows_out), float(layer.rows_in)] for layer in layers]
    on_host = torch.tensor(known, dtype=torch.float64, pin_memory=load_LE.is_cuda)
    tokens_L, rows_out_L, rows_in_L = on_host.to(load_LE.device, non_blocking=True).unbind(dim=1)
    assert len(layers) == n_layers
    return RoutingStats(
        tokens=tokens_L,
        load_E=load_LE,
        dropped_E=load_LE - torch.stack([layer.kept_E for layer in layers]),
        sent_G=sent_LG,
        token_entropy=entropy_L1.squeeze(-1),
        top1=top1_L1.squeeze(-1),
        rows_out=rows_out_L,
        rows_in=rows_in_L,
    )
