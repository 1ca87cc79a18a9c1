"""Device-level token dropping (arXiv 2405.04434, section 2.2.4). Training only.

Shapes: B sequences, S tokens a sequence, T = B * S, K experts a token, W ranks of the EP group, G
groups (the paper's devices).
"""

import torch
import torch.distributed as dist
from torch import Tensor


def exempt_sequences(sequence_ids_B: Tensor, fraction: float, seed: int) -> Tensor:
    """bool [B]: is the sequence one of the `fraction` whose tokens are never dropped?

    A hash of the sequence's place in the run's global order decides, so the choice is the same on
    every layout and after a resume. int64 products wrap around, which is what mixes the bits.
    """
    offset = ((seed + 1) * 0x2545F4914F6CDD1D + 2**63) % 2**64 - 2**63  # wrapped as int64 would be
    x = (sequence_ids_B + 1) * 0x9E3779B97F4A7C1 + offset
    for multiplier in (0x7F4A7C159E3779B, 0x14F6CDD1D2545F49):
        x = (x ^ ((x >> 29) & 0x7FFFFFFFF)) * multiplier
    uniform_B = ((x >> 32) & 0xFFFFFF).double() / 2**24
    return uniform_B < fraction


def kept_by_budget(
    affinity_P: Tensor, groups_P: Tensor, exempt_P: Tensor, n_group: int, budget: int
) -> Tensor:
    """bool [P]: which of the P (token, expert) pairs stay when each group may serve `budget` pairs.

    Within a group the pairs of highest affinity stay; of equal affinities the earlier pair stays.
    Exempt pairs always stay and count towards the budget first.
    """
    # Affinities are at most 1, so 2 puts the exempt pairs before all others.
    order = torch.where(exempt_P, 2.0, affinity_P).sort(descending=True, stable=True).indices
    order = order[groups_P[order].sort(stable=True).indices]
    # Not bincount, for which the host would wait.
    load_G = torch.zeros(n_group, dtype=torch.int64, device=order.device)
    load_G.scatter_add_(0, groups_P, torch.ones_like(groups_P))
    first_G = load_G.cumsum(0) - load_G
    place_P = torch.empty_like(order)
    place_P[order] = torch.arange(len(order), device=order.device)
    return exempt_P | (place_P - first_G[groups_P] < budget)


def _gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[W, *x.shape]: every rank's x, in rank order."""
    if group is None:
        return x.unsqueeze(0)
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


@torch.no_grad()
def keep_within_budget(
    weights_TK: Tensor,
    group_ids_TK: Tensor,
    sequence_ids_B: Tensor,
    n_group: int,
    capacity_factor: float,
    exempt_fraction: float,
    exempt_seed: int,
    ep_group: dist.ProcessGroup | None,
) -> Tensor:
    """bool [T, K]: the pairs that stay, ranked over the tokens of the whole EP group.

    A group's budget is capacity_factor times its average load over that population. Sequences are put
    into their global order first, so ties too fall the same way on every layout.
    """
    top_k, n_sequences = weights_TK.shape[1], len(sequence_ids_B)
    ids_Q = _gather(sequence_ids_B, ep_group).flatten()  # Q = W * B sequences of the population
    order_Q = ids_Q.argsort(stable=True)
    # [Q, S * K], one row a sequence
    weights_QP = _gather(weights_TK, ep_group).view(len(ids_Q), -1)[order_Q]
    groups_QP = _gather(group_ids_TK, ep_group).view(len(ids_Q), -1)[order_Q]
    exempt_Q = exempt_sequences(ids_Q, exempt_fraction, exempt_seed)[order_Q]
    budget = int(capacity_factor * weights_QP.numel() / n_group)
    keep_QP = torch.empty_like(weights_QP, dtype=torch.bool)
    keep_QP[order_Q] = kept_by_budget(
        weights_QP.flatten(),
        groups_QP.flatten(),
        exempt_Q.repeat_interleave(weights_QP.shape[1]),
        n_group,
        budget,
    ).view_as(keep_QP)
    rank = 0 if ep_group is None else ep_group.rank()
    return keep_QP[rank * n_sequences : (rank + 1) * n_sequences].reshape(-1, top_k)
