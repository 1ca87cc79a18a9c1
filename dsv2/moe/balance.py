"""The three balance losses (arXiv 2405.04434, section 2.2.3, eqs. 23-31).

Shapes: B sequences, S tokens a sequence, T = B * S, E routed experts, K experts a token, G groups
(D in the paper). Every loss is 1 for a perfectly uniform router (the communication loss: 1 when every
token reaches M groups), is computed per sequence and averaged over the sequences, so that
micro-batch, accumulation and layout cannot change its gradient. Gradient flows through P only.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsv2.moe.router import Routing, pairs_TE, tokens_sent_TG


class BalanceLosses(NamedTuple):
    """Raw losses, before alpha: fp32 scalars, means over the sequences given."""

    expert: Tensor  # eq. 23 / alpha_1
    device: Tensor  # eq. 26 / alpha_2
    comm: Tensor  # eq. 29 / alpha_3


def balance_losses(routing: Routing, n_sequences: int, n_group: int, topk_group: int) -> BalanceLosses:
    """Losses of the `n_sequences` sequences whose tokens stand one sequence after another in `routing`."""
    top_k, n_experts = routing.expert_ids_TK.shape[1], routing.affinity_TE.shape[1]
    with torch.no_grad():
        selected_BSE = pairs_TE(routing.expert_ids_TK, n_experts).unflatten(0, (n_sequences, -1))
        sent_BSG = tokens_sent_TG(routing.expert_ids_TK, n_experts, n_group).unflatten(0, (n_sequences, -1))
        f_BE = selected_BSE.mean(dim=1) * (n_experts / top_k)  # eq. 24
        f_device_BG = f_BE.unflatten(-1, (n_group, -1)).mean(dim=-1)  # eq. 27
        f_comm_BG = sent_BSG.float().mean(dim=1) * (n_group / topk_group)  # eq. 30
    p_BE = routing.affinity_TE.unflatten(0, (n_sequences, -1)).mean(dim=1)  # eq. 25
    p_BG = p_BE.unflatten(-1, (n_group, -1)).sum(dim=-1)  # eqs. 28 and 31
    return BalanceLosses(
        expert=(f_BE * p_BE).sum(dim=-1).mean(),
        device=(f_device_BG * p_BG).sum(dim=-1).mean(),
        comm=(f_comm_BG * p_BG).sum(dim=-1).mean(),
    )
