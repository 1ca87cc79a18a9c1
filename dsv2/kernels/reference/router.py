"""Device-limited routing (arXiv 2405.04434, eqs. 21-22 and section 2.2.2), and sums over its result."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.kernels.types import Choice, SequenceSums


def _top_indices(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest scores of each row. Ties go to the lower index, on every device."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def route(x_TD: Tensor, centroids_ED: Tensor, top_k: int, n_group: int, topk_group: int) -> Choice:
    """Select K experts per token within the M = `topk_group` groups of highest affinity.

    Affinities are a softmax over ALL routed experts, in fp32 whatever the dtype of x. A group's score is the
    MAX of its experts' affinities. Group g holds the g-th block of E / G consecutive experts.
    Gradients flow through the affinities, not through the selection.
    """
    affinity_TE = F.linear(x_TD.float(), centroids_ED.float()).softmax(dim=-1)
    scores_TE = affinity_TE.detach()
    if topk_group < n_group:
        by_group = scores_TE.unflatten(-1, (n_group, -1))  # [T, G, E / G]
        groups_TM = _top_indices(by_group.amax(dim=-1), topk_group)
        is_open_TG = torch.zeros(by_group.shape[:2], dtype=torch.bool, device=x_TD.device)
        is_open_TG.scatter_(1, groups_TM, True)
        # -1 is below every affinity: a closed expert loses even to one whose affinity underflowed to 0.
        scores_TE = by_group.masked_fill(~is_open_TG.unsqueeze(-1), -1.0).flatten(-2)
    expert_ids_TK = _top_indices(scores_TE, top_k)
    return Choice(expert_ids_TK, affinity_TE.gather(1, expert_ids_TK), affinity_TE)


def sequence_sums(choice: Choice, n_sequences: int, n_group: int) -> SequenceSums:
    """Return sums over `n_sequences` sequences, whose tokens follow one another in `choice`."""
    ids_TK = choice.expert_ids_TK
    affinity_TE = choice.affinity_TE
    detached_TE = affinity_TE.detach()
    n_experts = affinity_TE.shape[1]
    selected_TE = torch.zeros_like(detached_TE).scatter_(1, ids_TK, 1.0)
    sent_TG = detached_TE.new_zeros(len(ids_TK), n_group).scatter_(1, ids_TK // (n_experts // n_group), 1.0)
    entropy_T = torch.special.entr(detached_TE).sum(dim=-1)
    top1_T = choice.affinity_TK[:, 0].detach()
    per_token = (affinity_TE, selected_TE, sent_TG, entropy_T, top1_T)
    return SequenceSums(*(values.unflatten(0, (n_sequences, -1)).sum(dim=1) for values in per_token))
