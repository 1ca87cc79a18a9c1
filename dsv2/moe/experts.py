"""Feed-forward networks: the dense FFN, the shared experts, and the stack of routed experts."""

import torch
from torch import Tensor, nn

from dsv2.kernels.sets import REFERENCE, KernelSet
from dsv2.kernels.types import LateGradients
from dsv2.moe.dispatch import Arrived


class SwiGLU(nn.Module):
    """Computes down(silu(gate x) * up x): the dense FFN or, as one wide network, the shared experts."""

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
    parameter. `first_expert` is the index of this rank's first expert in the whole layer.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        *,
        n_experts: int,
        first_expert: int,
        n_local: int,
        kernels: KernelSet = REFERENCE,
    ):
        super().__init__()
        self.kernels = kernels
        self.n_experts = n_experts
        self.first_expert = first_expert
        self.n_local = n_local
        self.w13 = nn.Parameter(torch.empty(n_local, 2 * width, hidden_size))  # [E, 2F, D], gate above up
        self.w2 = nn.Parameter(torch.empty(n_local, hidden_size, width))  # [E, D, F]

    def late_gradients(self) -> LateGradients | None:
        """Return a node for `forward`, with which the weights' gradients come after the rows' gradients."""
        return self.kernels.late_gradients(self.w13, self.w2)

    def forward(self, arrived: Arrived, late: LateGradients | None = None) -> Tensor:
        """Return each row's weighted sum over this rank's experts, [X, D].

        ExpertKernels in dsv2/kernels/base.py explains the arguments.
        """
        return self.kernels.routed_experts(
            arrived.x_XD,
            arrived.expert_ids_XK,
            arrived.weights_XK,
            arrived.rows_of_expert,
            n_pairs=arrived.n_pairs,
            first_expert=self.first_expert,
            w13_E2FD=self.w13,
            w2_EDF=self.w2,
            late=late,
        )
