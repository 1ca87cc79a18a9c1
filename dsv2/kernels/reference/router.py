"""Device-limited routing (arXiv 2405.04434, eqs. 21-22 and section 2.2.2), and sums of its outcome.

Shapes: B sequences, S tokens a sequence, T = B * S, D hidden_size, E routed experts, K experts a token,
G expert groups.
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


class SequenceSums(NamedTuple):
    """Sums over each sequence's tokens, fp32 (exact for counts): what losses and statistics need."""

    affinity_BE: Tensor  # of s; gradient flows
    selected_BE: Tensor  # tokens that select the expert
    sent_BG: Tensor  # tokens with an expert in the group
    entropy_B: Tensor  # of the affinity's entropy, nats
    top1_B: Tensor  # of the highest affinity selected


def sequence_sums(routing: Routing, n_sequences: int, n_group: int) -> SequenceSums:
    """Sums of `n_sequences` sequences whose tokens stand one sequence after another in `routing`."""
    ids_TK, affinity_TE = routing.expert_ids_TK, routing.affinity_TE
    detached_TE = affinity_TE.detach()
    n_experts = affinity_TE.shape[1]
    selected_TE = torch.zeros_like(detached_TE).scatter_(1, ids_TK, 1.0)
    sent_TG = detached_TE.new_zeros(len(ids_TK), n_group).scatter_(1, ids_TK // (n_experts // n_group), 1.0)
    entropy_T = torch.special.entr(detached_TE).sum(dim=-1)
    top1_T = routing.weights_TK[:, 0].detach()
    parts = (affinity_TE, selected_TE, sent_TG, entropy_T, top1_T)
    return SequenceSums(*(part.unflatten(0, (n_sequences, -1)).sum(dim=1) for part in parts))
