"""Checks of the mixture of experts: router, balance losses, and the experts of each rank. No torch."""

from dsv2.config.rules import (
    MANY,
    refuse,
    require_above_0,
    require_fraction,
    require_positive,
    require_seed,
)
from dsv2.config.schema import ModelConfig
from dsv2.moe.routers.kinds import router_of


def check_experts(model: ModelConfig) -> None:
    """Refuse experts, a router or balance losses that cannot be built; UserError names the field."""
    require_positive("model", model, ["n_routed_experts"], most=MANY)
    router_of(model).check(model)
    balance = model.balance
    require_positive("model.balance", balance, ["alpha_expert", "alpha_device", "alpha_comm"], least=0)
    require_fraction("model.balance", balance, ["exempt_fraction"])
    require_above_0("model.balance", balance, ["capacity_factor"])
    require_seed("model.balance.exempt_seed", balance.exempt_seed)


def check_experts_of_ranks(model: ModelConfig, ep_size: int, world_size: int) -> None:
    """Refuse an expert-parallel size that does not fit processes, experts and groups; UserError names it."""
    if not 1 <= ep_size <= world_size or world_size % ep_size:
        reason = f"must divide the number of processes, {world_size}"
        hint = (
            "; or start another number (NPROC=N launch/local.sh, torchrun --nproc_per_node=N; a plan: gpus=N)"
        )
    elif model.n_routed_experts % ep_size:
        reason = f"must divide model.n_routed_experts={model.n_routed_experts}"
        hint = ""
    elif _splits_groups(model, ep_size):
        reason = (
            f"must divide model.n_group={model.n_group} or be a multiple of it, so that no rank holds "
            "parts of two groups"
        )
        hint = ""
    else:
        return
    sizes = [str(size) for size in range(1, world_size + 1) if fits(model, size, world_size)]
    right = f"{reason}: one of {', '.join(sizes)}" if len(sizes) > 1 else f"{reason}: only 1 fits"
    if world_size == 1:
        right = "must be 1 with 1 process"
    refuse("parallel.expert_parallel_size", ep_size, right + hint)


def fits(model: ModelConfig, ep_size: int, world_size: int) -> bool:
    """Return whether `world_size` processes can share the routed experts in groups of `ep_size`."""
    divides = world_size % ep_size == 0 and model.n_routed_experts % ep_size == 0
    return divides and not _splits_groups(model, ep_size)


def _splits_groups(model: ModelConfig, ep_size: int) -> bool:
    return ep_size % model.n_group != 0 and model.n_group % ep_size != 0
