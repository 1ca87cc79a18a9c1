"""Feed-forward networks: the dense one, the shared one, and the stack of routed experts.

Shapes: D hidden_size, F width, E experts held by this rank, R rows, K experts a row, P pairs of a row
and an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv2.kernels.experts import grouped_swiglu
from dsv2.kernels.rows import gather_rows, map_rows, sum_rows


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x); the dense FFN and, as one wide network, the shared experts."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RoutedExperts(nn.Module):
    """This rank's block of the routed experts, stacked along dim 0.

    Expert parallelism cuts dim 0 only, so a rank's share is one contiguous range of the whole
    parameter. `first_expert` is the whole layer's index of the first expert here.
    """

    def __init__(self, hidden_size: int, width: int, n_experts: int, first_expert: int, n_local: int):
        super().__init__()
        self.n_experts, self.first_expert, self.n_local = n_experts, first_expert, n_local
        self.w13 = nn.Parameter(torch.empty(n_local, 2 * width, hidden_size))  # gate above up
        self.w2 = nn.Parameter(torch.empty(n_local, hidden_size, width))

    def forward(
        self, x_RD: Tensor, expert_ids_RK: Tensor, weights_RK: Tensor, rows_of_expert: Tensor, n_pairs: int
    ) -> Tensor:
        """sum_k weights[r, k] * FFN_ids[r, k](x_r), [R, D]; added up in fp32.

        Args:
            expert_ids_RK: counted from this rank's first expert; -1 adds nothing.
            rows_of_expert: int64 [E], how often each expert is chosen.
            n_pairs: their sum, or more: as many rows are made room for.
        """
        key_RK = expert_ids_RK.where(expert_ids_RK >= 0, self.n_local)
        pairs = map_rows(key_RK, n_pairs)
        y_PD = grouped_swiglu(gather_rows(x_RD, pairs), rows_of_expert, self.w13, self.w2)
        return sum_rows(y_PD, weights_RK, pairs, len(x_RD))
