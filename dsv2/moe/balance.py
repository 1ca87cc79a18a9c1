"""The three balance losses (arXiv 2405.04434, section 2.2.3, eqs. 23-31).

Every loss is 1 for a perfectly uniform router; the communication loss is 1 when every token reaches M
groups. Each is computed per sequence and averaged over the sequences. Micro-batch, accumulation and
layout therefore cannot change its gradient, which flows through the affinities only (the paper's P).
The expert groups are the paper's D devices.
"""

from typing import NamedTuple

from torch import Tensor

from dsv2.kernels.types import SequenceSums


class BalanceLosses(NamedTuple):
    """Raw losses of each layer, before alpha: fp32 [L], means over the sequences."""

    expert: Tensor  # eq. 23 / alpha_1
    device: Tensor  # eq. 26 / alpha_2
    comm: Tensor  # eq. 29 / alpha_3


def balance_losses(
    sums: SequenceSums, n_tokens: int, top_k: int, n_group: int, topk_group: int
) -> BalanceLosses:
    """Return the losses of L layers.

    Args:
        sums: of all layers, each with a leading L.
        n_tokens: of each sequence.
        top_k: the number of experts that each token chooses.
    """
    n_experts = sums.selected_BE.shape[-1]
    f_LBE = sums.selected_BE * (n_experts / (top_k * n_tokens))  # eq. 24
    f_device_LBG = f_LBE.unflatten(-1, (n_group, -1)).mean(dim=-1)  # eq. 27
    f_comm_LBG = sums.sent_BG * (n_group / (topk_group * n_tokens))  # eq. 30
    p_LBE = sums.affinity_BE / n_tokens  # eq. 25
    p_LBG = p_LBE.unflatten(-1, (n_group, -1)).sum(dim=-1)  # eqs. 28 and 31
    return BalanceLosses(
        expert=(f_LBE * p_LBE).sum(dim=-1).mean(dim=-1),
        device=(f_device_LBG * p_LBG).sum(dim=-1).mean(dim=-1),
        comm=(f_comm_LBG * p_LBG).sum(dim=-1).mean(dim=-1),
    )
