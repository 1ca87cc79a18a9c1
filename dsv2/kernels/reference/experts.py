"""The routed experts' networks: rows go to their experts, and come back as weighted sums.

Shapes: R rows, K slots a row, P pairs of a row and an expert, D hidden_size, E experts (local), F width
of an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.kernels.reference.rows import gather_rows, map_rows, sum_rows


def grouped_swiglu(x_PD: Tensor, counts_E: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
    """W2 (silu(W1 x) * W3 x) with each row's expert, [P, D].

    `counts[e]` consecutive rows belong to expert e; rows beyond them all give zeros. `w13` holds W1
    (gate) above W3 (up), so that one product serves both. An expert without rows still takes part in
    the graph: its gradient is zero, not missing, and every rank reduces the same tensors.
    """
    counts = counts_E.tolist()
    rest = len(x_PD) - sum(counts)
    parts = []
    for x_pD, w13_2FD, w2_DF in zip(x_PD.split([*counts, rest]), w13_E2FD, w2_EDF, strict=False):
        gate_pF, up_pF = F.linear(x_pD, w13_2FD).chunk(2, dim=-1)
        parts.append(F.linear(F.silu(gate_pF) * up_pF, w2_DF))
    return torch.cat([*parts, x_PD.new_zeros(rest, x_PD.shape[1])])


def routed_experts(
    x_RD: Tensor,
    expert_ids_RK: Tensor,
    weights_RK: Tensor,
    counts_E: Tensor,
    n_pairs: int,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
) -> Tensor:
    """sum_k weights[r, k] * FFN_ids[r, k](x_r), [R, D]; added up in fp32.

    Args:
        expert_ids_RK: int64; -1 adds nothing.
        counts_E: int64 [E], how often each expert is chosen.
        n_pairs: their sum, or more: as many rows are made room for.
    """
    pairs = map_rows(expert_ids_RK.where(expert_ids_RK >= 0, len(counts_E)), n_pairs)
    y_PD = grouped_swiglu(gather_rows(x_RD, pairs), counts_E, w13_E2FD, w2_EDF)
    return sum_rows(y_PD, pairs, len(x_RD), weights_RK)
