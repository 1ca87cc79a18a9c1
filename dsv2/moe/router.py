"""Device-limited routing (arXiv 2405.04434, eqs. 21-22 and section 2.2.2).

Shapes: T tokens, D hidden_size, E routed experts, K experts a token, G expert groups.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Routing(NamedTuple):
    """The router's outcome; everything downstream is computed from it."""

    expert_ids_TK: Tensor  # int64, by descending affinity
    weights_TK: Tensor  # fp32: g_i of eq. 21, the affinity itself, not renormalised
    affinity_TE: Tensor  # fp32: s_i of eq. 22, before any masking


def _top_indices(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores of each row; ties go to the lower index, on every device."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def route(x_TD: Tensor, centroids_ED: Tensor, top_k: int, n_group: int, topk_group: int) -> Routing:
    """Select K experts a token within the M = `topk_group` groups of highest affinity.

    Affinities are a softmax over ALL routed experts, in fp32 whatever the dtype of x. A group's score
    is the MAX of its experts' affinities. Experts of group g are the g-th block of E / G consecutive
    ones. Gradients flow through the affinities, not through the selection.
    """
    affinity_TE = F.linear(x_TD.float(), centroids_ED.float()).softmax(dim=-1)
    scores_TE = affinity_TE.detach()
    if topk_group < n_group:
        scores_TGe = scores_TE.unflatten(-1, (n_group, -1))
        groups_TM = _top_indices(scores_TGe.amax(dim=-1), topk_group)
        open_TG = torch.zeros(scores_TGe.shape[:2], dtype=torch.bool, device=x_TD.device)
        open_TG.scatter_(1, groups_TM, True)
        # -1 is below every affinity: a closed expert loses even to one whose affinity underflowed to 0.
        scores_TE = scores_TGe.masked_fill(~open_TG.unsqueeze(-1), -1.0).flatten(-2)
    expert_ids_TK = _top_indices(scores_TE, top_k)
    return Routing(expert_ids_TK, affinity_TE.gather(1, expert_ids_TK), affinity_TE)


def tokens_sent_TG(expert_ids_TK: Tensor, n_experts: int, n_group: int) -> Tensor:
    """bool [T, G]: does any of the token's experts live in group g?"""
    sent_TG = torch.zeros(len(expert_ids_TK), n_group, dtype=torch.bool, device=expert_ids_TK.device)
    return sent_TG.scatter_(1, expert_ids_TK // (n_experts // n_group), True)


def pairs_TE(expert_ids_TK: Tensor, n_experts: int) -> Tensor:
    """fp32 [T, E]: 1 where the token selects the expert."""
    selected_TE = torch.zeros(len(expert_ids_TK), n_experts, device=expert_ids_TK.device)
    return selected_TE.scatter_(1, expert_ids_TK, 1.0)
