"""Device-level token dropping (arXiv 2405.04434, section 2.2.4), for training only.

The paper's devices correspond to the expert groups. `layer.py` calls `keep_within_budget`, and dispatch sends
only the pairs that it keeps.
"""

import torch
from torch import Tensor

from dsv2.config.schema import BalanceConfig
from dsv2.parallel.mesh import MeshDim


def exempt_sequences(sequence_ids_B: Tensor, fraction: float, seed: int) -> Tensor:
    """Return bool [B]: whether the sequence is exempt. Exempt sequences never lose a token.

    About `fraction` of all sequences are exempt. A hash of the sequence's position in the run's global order
    decides, so the choice is the same on every layout and after a resume. The overflow of int64 products
    mixes the bits.
    """
    offset = ((seed + 1) * 0x2545F4914F6CDD1D + 2**63) % 2**64 - 2**63  # wrapped as int64 would be
    hash_B = (sequence_ids_B + 1) * 0x9E3779B97F4A7C1 + offset
    for multiplier in (0x7F4A7C159E3779B, 0x14F6CDD1D2545F49):
        hash_B = (hash_B ^ ((hash_B >> 29) & 0x7FFFFFFFF)) * multiplier
    uniform_B = ((hash_B >> 32) & 0xFFFFFF).double() / 2**24
    return uniform_B < fraction


def kept_by_budget(
    affinity_P: Tensor, groups_P: Tensor, exempt_P: Tensor, n_group: int, budget: int
) -> Tensor:
    """Return bool [P]: the pairs to keep when each group may serve `budget` pairs.

    Within a group the pairs of highest affinity are kept. Of two pairs of equal affinity, the earlier one is
    kept. Exempt pairs are always kept, and count towards the budget first.
    """
    # Affinities are at most 1, so 2 puts the exempt pairs before all others.
    order = torch.where(exempt_P, 2.0, affinity_P).sort(descending=True, stable=True).indices
    order = order[groups_P[order].sort(stable=True).indices]
    # bincount would make the host wait for the device.
    load_G = torch.zeros(n_group, dtype=torch.int64, device=order.device)
    load_G.scatter_add_(0, groups_P, torch.ones_like(groups_P))
    start_G = load_G.cumsum(0) - load_G
    position_P = torch.empty_like(order)
    position_P[order] = torch.arange(len(order), device=order.device)
    return exempt_P | (position_P - start_G[groups_P] < budget)


@torch.no_grad()
def keep_within_budget(
    affinity_TK: Tensor,
    group_ids_TK: Tensor,
    sequence_ids_B: Tensor,
    *,
    n_group: int,
    balance: BalanceConfig,
    ep: MeshDim,
) -> Tensor:
    """Return bool [T, K]: the pairs to keep, ranked over the tokens of all `ep` ranks. Collective.

    A group's budget is `capacity_factor` times the average load of a group over these tokens. Sequences are
    first sorted into the run's global order. So ties are decided alike on every layout.
    """
    top_k = affinity_TK.shape[1]
    n_sequences = len(sequence_ids_B)
    ids = ep.gather(sequence_ids_B).flatten()  # of all W x B sequences
    order = ids.argsort(stable=True)
    affinity = ep.gather(affinity_TK).view(len(ids), -1)[order]  # one row per sequence, S x K pairs each
    groups = ep.gather(group_ids_TK).view(len(ids), -1)[order]
    exempt = exempt_sequences(ids, balance.exempt_fraction, balance.exempt_seed)[order]
    kept_P = kept_by_budget(
        affinity.flatten(),
        groups.flatten(),
        exempt.repeat_interleave(affinity.shape[1]),
        n_group,
        budget=int(balance.capacity_factor * affinity.numel() / n_group),
    )
    keep = torch.empty_like(affinity, dtype=torch.bool)
    keep[order] = kept_P.view_as(keep)
    first = ep.rank * n_sequences
    return keep[first : first + n_sequences].reshape(-1, top_k)
