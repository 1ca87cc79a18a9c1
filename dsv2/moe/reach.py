"""The number of ranks that hold a token's experts, for a uniform router."""

from math import comb

from dsv2.config.schema import ModelConfig


def mean_ranks(model: ModelConfig, ep_size: int, limited: bool) -> float:
    """Return the mean number of ranks that hold a token's K experts.

    Args:
        limited: if True, the K experts lie in M of the G groups; otherwise they may be any experts.
    """
    experts = model.n_routed_experts
    top_k = model.num_experts_per_tok
    groups = model.n_group if limited else 1
    open_groups = model.topk_group if limited else 1
    per_rank = experts // ep_size
    per_group = experts // groups
    pool = open_groups * per_group
    if per_rank <= per_group:  # all experts of a rank lie in one group, which is open with probability M / G
        missed_if_open = comb(pool - per_rank, top_k) / comb(pool, top_k)
        return ep_size * open_groups / groups * (1 - missed_if_open)
    # A rank holds whole groups. The number of open ones among them has a hypergeometric distribution.
    groups_per_rank = groups // ep_size
    missed = 0.0  # probability that a rank holds none of the token's experts
    for n_open in range(min(groups_per_rank, open_groups) + 1):
        ways = comb(groups_per_rank, n_open) * comb(groups - groups_per_rank, open_groups - n_open)
        chosen_elsewhere = comb(pool - n_open * per_group, top_k) / comb(pool, top_k)
        missed += ways / comb(groups, open_groups) * chosen_elsewhere
    return ep_size * (1 - missed)
