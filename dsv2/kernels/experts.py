"""SwiGLU experts applied to rows grouped by expert.

Shapes: R rows, D hidden_size, E experts (local), F width of an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_swiglu(x_RD: Tensor, counts_E: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
    """W2 (silu(W1 x) * W3 x) with each row's expert, [R, D].

    `counts[e]` consecutive rows belong to expert e; rows beyond them all give zeros. `w13` holds W1
    (gate) above W3 (up), so that one product serves both. An expert without rows still takes part in
    the graph: its gradient is zero, not missing, and every rank reduces the same tensors.
    """
    counts = counts_E.tolist()
    rest = len(x_RD) - sum(counts)
    parts = []
    for x_rD, w13_2FD, w2_DF in zip(x_RD.split([*counts, rest]), w13_E2FD, w2_EDF, strict=False):
        gate_rF, up_rF = F.linear(x_rD, w13_2FD).chunk(2, dim=-1)
        parts.append(F.linear(F.silu(gate_rF) * up_rF, w2_DF))
    return torch.cat([*parts, x_RD.new_zeros(rest, x_RD.shape[1])])
