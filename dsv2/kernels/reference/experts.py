"""The routed experts' networks: rows go to their experts and come back as weighted sums."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.kernels.reference.rows import copy_rows, map_rows, sum_rows
from dsv2.kernels.types import LateGradients


def grouped_swiglu(x_PD: Tensor, counts_E: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
    """Return W2 (silu(W1 x) * W3 x) with the matrices of each row's expert, [P, D].

    `counts[e]` consecutive rows belong to expert e. The rows after the last expert's give zeros. `w13` holds
    W1 (gate) above W3 (up), so that one product serves both. An expert without rows still takes part in the
    graph. Its gradient is zero, not missing, so every rank reduces the same tensors.
    """
    counts = counts_E.tolist()
    rest = len(x_PD) - sum(counts)
    outputs = []
    for x, w13, w2 in zip(x_PD.split([*counts, rest]), w13_E2FD, w2_EDF, strict=False):
        gate, up = F.linear(x, w13).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up, w2))
    return torch.cat([*outputs, x_PD.new_zeros(rest, x_PD.shape[1])])


def routed_experts(
    x_XD: Tensor,
    expert_ids_XK: Tensor,
    weights_XK: Tensor,
    counts_E: Tensor,
    *,
    n_pairs: int,
    first_expert: int,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    late: LateGradients | None = None,
) -> Tensor:
    """Return each row's weighted sum over its experts, [X, D]; see ExpertKernels."""
    ids_XK = expert_ids_XK.long() - first_expert
    is_here_XK = (ids_XK >= 0) & (ids_XK < len(counts_E))
    pairs = map_rows(ids_XK.where(is_here_XK, len(counts_E)), n_pairs)
    y_PD = grouped_swiglu(copy_rows(x_XD, pairs), counts_E, w13_E2FD, w2_EDF)
    return sum_rows(y_PD, pairs, len(x_XD), weights_XK)


def late_gradients(w13_E2FD: Tensor, w2_EDF: Tensor) -> None:
    """Return None: autograd computes all gradients of this module together."""
    return
