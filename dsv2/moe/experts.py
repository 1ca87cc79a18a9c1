"""Feed-forward networks: the dense one, the shared one, and the stack of routed experts.

Shapes: D hidden_size, F width, E experts held by this rank, R rows, K experts a row.
"""

import torch
from torch import Tensor, nn

from dsv2.kernels.sets import REFERENCE, KernelSet


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x); the dense FFN and, as one wide network, the shared experts."""

    def __init__(self, hidden_size: int, width: int, kernels: KernelSet = REFERENCE):
        super().__init__()
        self.kernels = kernels
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.swiglu(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class RoutedExperts(nn.Module):
    """This rank's block of the routed experts, stacked along dim 0.

    Expert parallelism cuts dim 0 only, so a rank's share is one contiguous range of the whole
    parameter. `first_expert` is the whole layer's index of the first expert here.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        n_experts: int,
        first_expert: int,
        n_local: int,
        kernels: KernelSet = REFERENCE,
    ):
        super().__init__()
        self.kernels = kernels
        self.n_experts, self.first_expert, self.n_local = n_experts, first_expert, n_local
        self.w13 = nn.Parameter(torch.empty(n_local, 2 * width, hidden_size))  # gate above up
        self.w2 = nn.Parameter(torch.empty(n_local, hidden_size, width))

    def forward(
        self, x_RD: Tensor, expert_ids_RK: Tensor, weights_RK: Tensor, rows_of_expert: Tensor, n_pairs: int
    ) -> Tensor:
        """Each row's sum over this rank's experts, [R, D]; see dsv2/kernels/reference/experts.py. Experts are
        counted from this rank's first."""
        return self.kernels.routed_experts(
            x_RD, expert_ids_RK, weights_RK, rows_of_expert, n_pairs, self.w13, self.w2
        )
