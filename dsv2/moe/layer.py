"""The DeepSeekMoE layer (arXiv 2405.04434, section 2.2, eq. 20).

Shapes: B sequences, S tokens a sequence, T = B * S, D hidden_size, K experts a token.
"""

from typing import NamedTuple

from torch import Tensor, nn

from dsv2.config.schema import ModelConfig
from dsv2.moe.balance import BalanceLosses, balance_losses
from dsv2.moe.dispatch import combine, plan_dispatch, start_dispatch
from dsv2.moe.drop import keep_within_budget
from dsv2.moe.execution import Execution
from dsv2.moe.experts import RoutedExperts, SwiGLU
from dsv2.moe.stats import RoutingStats, routing_stats


class MoEOutput(NamedTuple):
    """Losses and statistics are return values: a recomputed layer cannot count them twice."""

    y_BSD: Tensor
    losses: BalanceLosses
    stats: RoutingStats


class MoELayer(nn.Module):
    """Shared experts on every token plus K routed experts, chosen within M groups.

    The EP group's ranks share one copy of the routed experts.
    """

    def __init__(self, config: ModelConfig, execution: Execution):
        super().__init__()
        self.config, self.execution, group = config, execution, execution.ep_group
        ep_size, ep_rank = (1, 0) if group is None else (group.size(), group.rank())
        n_experts, width = config.n_routed_experts, config.moe_intermediate_size
        assert n_experts % ep_size == 0, "validate() checks this"
        n_local = n_experts // ep_size
        self.gate = nn.Linear(config.hidden_size, n_experts, bias=False)  # rows are the centroids e_i
        kernels = execution.kernels
        self.experts = RoutedExperts(
            config.hidden_size, width, n_experts, ep_rank * n_local, n_local, kernels
        )
        # A shared FFN of n times the width is n shared experts, added up.
        self.shared_experts = (
            SwiGLU(config.hidden_size, config.n_shared_experts * width, kernels)
            if config.n_shared_experts
            else None
        )

    def forward(self, x_BSD: Tensor, sequence_ids_B: Tensor, residual_BSD: Tensor | None = None) -> MoEOutput:
        """Eq. 20 of x, on top of the residual if given. Tokens are dropped in training only (2.2.4)."""
        assert len(sequence_ids_B) == len(x_BSD), "one id a sequence"
        config, balance, group = self.config, self.config.balance, self.execution.ep_group
        kernels = self.execution.kernels
        limits = (config.num_experts_per_tok, config.n_group, config.topk_group)
        (n_sequences, n_tokens), x_TD = x_BSD.shape[:2], x_BSD.flatten(0, 1)
        routing = kernels.route(x_TD, self.gate.weight, *limits)
        sums = kernels.sequence_sums(routing, n_sequences, config.n_group)
        keep_TK = None
        if self.training and balance.token_dropping:
            keep_TK = keep_within_budget(
                routing.weights_TK,
                routing.expert_ids_TK // (config.n_routed_experts // config.n_group),
                sequence_ids_B,
                config.n_group,
                balance.capacity_factor,
                balance.exempt_fraction,
                balance.exempt_seed,
                group,
            )
        plan = plan_dispatch(
            routing.expert_ids_TK, keep_TK, config.n_routed_experts, group, sums.selected_BE.sum(dim=0)
        )
        weights_TK = routing.weights_TK * config.routed_scaling_factor
        pending = start_dispatch(x_TD, weights_TK, plan, self.execution)
        # The shared experts run while rows are on their way (section 3.1.3).
        shared_BSD = None if self.shared_experts is None else self.shared_experts(x_BSD)
        y_RD = self.experts(*pending.wait(), plan.rows_of_expert, plan.n_pairs)
        routed_BSD = combine(y_RD, plan, self.execution).view_as(x_BSD)
        terms = [term for term in (shared_BSD, residual_BSD) if term is not None]
        return MoEOutput(
            kernels.add_up(routed_BSD, *terms),
            balance_losses(sums, n_tokens, *limits),
            routing_stats(sums, n_tokens, plan.kept_E, plan.exchange),
        )
