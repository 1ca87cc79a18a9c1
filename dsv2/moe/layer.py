"""The DeepSeekMoE layer (arXiv 2405.04434, section 2.2, eq. 20)."""

from typing import NamedTuple

from torch import Tensor, nn

from dsv2.config.schema import ModelConfig
from dsv2.kernels.types import Choice
from dsv2.moe.balance import BalanceLosses, balance_losses
from dsv2.moe.dispatch import combine, plan_dispatch, start_dispatch
from dsv2.moe.drop import keep_within_budget
from dsv2.moe.execution import Execution
from dsv2.moe.experts import RoutedExperts, SwiGLU
from dsv2.moe.routers.kinds import router_of
from dsv2.moe.stats import RoutingStats, routing_stats


class MoEOutput(NamedTuple):
    """A layer's results. Losses and statistics are returned, so recomputation cannot count them twice."""

    y_BSD: Tensor
    losses: BalanceLosses
    stats: RoutingStats


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
        n_sequences, n_positions = x_BSD.shape[:2]
        x_TD = x_BSD.flatten(0, 1)
        choice, weights_TK = self.gate(x_TD)
        sums = kernels.sequence_sums(choice, n_sequences, config.n_group)
        keep_TK = self._kept(choice, sequence_ids_B)
        load_E = sums.selected_BE.sum(dim=0)
        plan = plan_dispatch(
            choice.expert_ids_TK, keep_TK, config.n_routed_experts, self.execution.ep, load_E
        )
        pending = start_dispatch(x_TD, weights_TK, plan, self.execution)
        # The shared experts run while rows are on their way (section 3.1.3).
        shared_BSD = None if self.shared_experts is None else self.shared_experts(x_BSD)
        y_XD = self.experts(*pending.wait(), plan.rows_of_expert, plan.n_pairs)
        routed_BSD = combine(y_XD, plan, self.execution).view_as(x_BSD)
        terms = [term for term in (shared_BSD, residual_BSD) if term is not None]
        return MoEOutput(
            y_BSD=kernels.add_up(routed_BSD, *terms),
            losses=balance_losses(
                sums, n_positions, config.num_experts_per_tok, config.n_group, config.topk_group
            ),
            stats=routing_stats(sums, n_positions, plan.kept_E, plan.exchange),
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
