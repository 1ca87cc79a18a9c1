"""The DeepSeekMoE layer (arXiv 2405.04434, section 2.2, eq. 20)."""

from typing import NamedTuple

from torch import Tensor, nn

from dsv2.config.schema import ModelConfig
from dsv2.kernels.types import Choice
from dsv2.moe.dispatch import start_dispatch
from dsv2.moe.drop import keep_within_budget
from dsv2.moe.execution import Execution
from dsv2.moe.experts import RoutedExperts, SwiGLU
from dsv2.moe.routers.kinds import router_of
from dsv2.moe.stats import LayerRouting


class MoEOutput(NamedTuple):
    """A layer's results. Sums over its routing are returned, so recomputation cannot count them twice."""

    y_BSD: Tensor
    routing: LayerRouting


class MoELayer(nn.Module):
    """Shared experts on every token plus K routed experts, which the router of `model.router` chooses.

    The ranks of `execution.ep` share one copy of the routed experts.
    """

    def __init__(self, config: ModelConfig, execution: Execution):
        super().__init__()
        self.config = config
        self.execution = execution
        ep = execution.ep
        n_experts = config.n_routed_experts
        assert n_experts % ep.size == 0, "validate() checks this"
        n_local = n_experts // ep.size
        self.gate = router_of(config).build(config, execution.kernels)
        self.experts = RoutedExperts(
            config.hidden_size,
            config.moe_intermediate_size,
            n_experts=n_experts,
            first_expert=ep.rank * n_local,
            n_local=n_local,
            kernels=execution.kernels,
        )
        self.shared_experts: SwiGLU | None = None
        if config.n_shared_experts:
            # An FFN of n times the width computes the sum of n shared experts.
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = SwiGLU(config.hidden_size, width, execution.kernels)

    def forward(self, x_BSD: Tensor, sequence_ids_B: Tensor, residual_BSD: Tensor | None = None) -> MoEOutput:
        """Compute eq. 20 of x, plus the residual. Only training drops tokens (section 2.2.4)."""
        assert len(sequence_ids_B) == len(x_BSD), "one id per sequence"
        config = self.config
        kernels = self.execution.kernels
        x_TD = x_BSD.flatten(0, 1)
        choice, weights_TK = self.gate(x_TD)
        sums = kernels.sequence_sums(choice, len(x_BSD), config.n_group)
        keep_TK = self._kept(choice, sequence_ids_B)
        load_E = sums.selected_BE.sum(dim=0)
        dispatch = start_dispatch(
            x_TD,
            weights_TK,
            expert_ids_TK=choice.expert_ids_TK,
            keep_TK=keep_TK,
            load_E=load_E,
            execution=self.execution,
        )
        # Made here, so that the backward pass comes to it after the rows' gradients have left.
        late = self.experts.late_gradients() if self.execution.ep.size > 1 else None
        # The shared experts run while rows are on their way (section 3.1.3).
        shared_BSD = None if self.shared_experts is None else self.shared_experts(x_BSD)
        y_XD = self.experts(dispatch.arrive(), late)
        routed_BSD = dispatch.combine(y_XD).view_as(x_BSD)
        terms = [term for term in (shared_BSD, residual_BSD) if term is not None]
        return MoEOutput(
            y_BSD=kernels.add_up(routed_BSD, *terms),
            routing=LayerRouting(sums, dispatch.kept_E, dispatch.rows_out, dispatch.rows_in),
        )

    def _kept(self, choice: Choice, sequence_ids_B: Tensor) -> Tensor | None:
        """Return bool [T, K]: the pairs within the budget; None keeps all."""
        config = self.config
        if not (self.training and config.balance.token_dropping):
            return None
        return keep_within_budget(
            choice.affinity_TK,
            choice.expert_ids_TK // (config.n_routed_experts // config.n_group),
            sequence_ids_B,
            n_group=config.n_group,
            balance=config.balance,
            ep=self.execution.ep,
        )
