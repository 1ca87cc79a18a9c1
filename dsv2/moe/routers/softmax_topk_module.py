"""Device-limited routing by softmax affinities as a module.

dsv2/kernels/reference/router.py defines the choice.
"""

from torch import Tensor, nn

from dsv2.config.schema import ModelConfig
from dsv2.kernels.sets import KernelSet
from dsv2.kernels.types import Routing
from dsv2.moe.routers.module import RouterModule


class SoftmaxTopKRouter(nn.Linear, RouterModule):
    """A linear layer whose rows are the experts' centroids, followed by the choice of experts."""

    def __init__(self, model: ModelConfig, kernels: KernelSet):
        super().__init__(model.hidden_size, model.n_routed_experts, bias=False)
        self.kernels = kernels
        self.limits = (model.num_experts_per_tok, model.n_group, model.topk_group)
        self.scaling = model.routed_scaling_factor

    def forward(self, x_TD: Tensor) -> Routing:
        """Return eqs. 21-22; the weights are the chosen affinities times routed_scaling_factor."""
        choice = self.kernels.route(x_TD, self.weight, *self.limits)
        return Routing(choice, weights_TK=choice.affinity_TK * self.scaling)
