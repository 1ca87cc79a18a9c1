"""How far a token's experts spread, for a uniform router."""

from math import comb

from dsv2.config.schema import ModelConfig


def mean_ranks(model: ModelConfig, ep_size: int, limited: bool) -> float:
    """Ranks that a token's K experts live on, for a uniform router.

    With the limit, M of the D groups are open and the K experts lie anywhere in them.
    """
    experts, top_k = model.n_routed_experts, model.num_experts_per_tok
    groups, limit = (model.n_group, model.topk_group) if limited else (1, 1)
    here = experts // ep_size  # of a rank
    in_group = experts // groups
    pool = limit * in_group
    if here <= in_group:  # a rank lies within one group: it is open with probability M / D
        return ep_size * limit / groups * (1 - comb(pool - here, top_k) / comb(pool, top_k))
    held = groups // ep_size  # whole groups of a rank; `open_here` of them are open, hypergeometrically
    missed = 0.0
    for open_here in range(min(held, limit) + 1):
        ways = comb(held, open_here) * comb(groups - held, limit - open_here) / comb(groups, limit)
        missed += ways * comb(pool - open_here * in_group, top_k) / comb(pool, top_k)
    return ep_size * (1 - missed)
