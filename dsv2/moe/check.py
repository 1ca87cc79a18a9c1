"""Checks of the mixture of experts: router, balance losses, and the experts of each rank. No torch."""

from dsv2.config.rules import divisors, refuse, require_above_0, require_fraction, require_positive
from dsv2.config.schema import ModelConfig
from dsv2.moe.routers.kinds import router_of


def check_experts(model: ModelConfig) -> None:
    """Refuse experts, a router or balance losses that cannot be built; UserError names the field."""
    require_positive("model", model, ["n_routed_experts"])
    router_of(model).check(model)
    balance = model.balance
    require_positive("model.balance", balance, ["alpha_expert", "alpha_device", "alpha_comm"], least=0)
    require_fraction("model.balance", balance, ["exempt_fraction"])
    require_above_0("model.balance", balance, ["capacity_factor"])


def check_experts_of_ranks(model: ModelConfig, ep_size: int) -> None:
    """Refuse an expert-parallel size that splits an expert or a group; UserError names the field."""
    field = "parallel.expert_parallel_size"
    if model.n_routed_experts % ep_size:
        right = f"must divide model.n_routed_experts={model.n_routed_experts}"
        refuse(field, ep_size, f"{right}: one of {divisors(model.n_routed_experts)}")
    if ep_size % model.n_group and model.n_group % ep_size:
        refuse(
            field,
            ep_size,
            f"must divide model.n_group={model.n_group} or be a multiple of it, so that no rank holds "
            "parts of two groups",
        )
