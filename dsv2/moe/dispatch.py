"""Moving rows to the ranks that hold their experts, and back.

Shapes: T tokens, K experts a token, D hidden_size, E experts of the layer, W ranks of the EP group,
P = T * K pairs of a token and one of its experts, S rows sent by this rank, R rows received by it.

`dispatch` returns the rows grouped by local expert and a frozen plan; `combine` consumes the plan.
With one rank the exchange is the identity, so the layer has no branch for expert parallelism.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """Where every row came from; computed once a layer."""

    pair_of_row_S: Tensor  # int64: index into the P pairs, grouped by expert
    n_pairs: int
    top_k: int
    sent: list[int]  # rows to each rank [W]
    received: list[int]  # rows from each rank [W]
    by_expert_R: Tensor | None  # int64: received rows, reordered to be grouped by local expert
    rows_of_expert: list[int]  # rows at each local expert [E / W]
    group: dist.ProcessGroup | None


class _AllToAll(torch.autograd.Function):
    """Uneven exchange of rows; its gradient is the exchange the other way."""

    @staticmethod
    def forward(ctx, x_SD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out_RD = x_SD.new_empty(sum(received), *x_SD.shape[1:])
        dist.all_to_all_single(out_RD, x_SD.contiguous(), received, sent, group=group)
        return out_RD

    @staticmethod
    def backward(ctx, grad_RD: Tensor):
        grad_SD = grad_RD.new_empty(sum(ctx.sent), *grad_RD.shape[1:])
        dist.all_to_all_single(grad_SD, grad_RD.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return grad_SD, None, None, None


def _exchange_counts(counts_E: Tensor, group: dist.ProcessGroup) -> tuple[list[int], list[int], Tensor]:
    """Rows to each rank, rows from each rank, and int64 [W, E / W]: the latter by local expert."""
    coming_E = torch.empty_like(counts_E)
    dist.all_to_all_single(coming_E, counts_E, group=group)
    coming_WE = coming_E.view(group.size(), -1)
    # All sizes cross to the host at once.
    to_and_from = torch.stack((counts_E.view_as(coming_WE).sum(dim=1), coming_WE.sum(dim=1)))
    sent, received = to_and_from.tolist()
    return sent, received, coming_WE


def dispatch(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    keep_TK: Tensor | None,
    n_experts: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, DispatchPlan]:
    """Send each kept pair's row to its expert's rank: ([R, D] grouped by local expert, plan).

    `keep_TK` (bool; None: all) leaves out dropped pairs, which are not sent. Rank w of the group holds
    the w-th block of E / W experts.
    """
    top_k = expert_ids_TK.shape[1]
    expert_of_pair_P = expert_ids_TK.flatten()
    pair_of_row_S = expert_of_pair_P.argsort(stable=True)
    if keep_TK is not None:
        pair_of_row_S = pair_of_row_S[keep_TK.flatten()[pair_of_row_S]]
        expert_of_pair_P = expert_of_pair_P[keep_TK.flatten()]
    counts_E = torch.bincount(expert_of_pair_P, minlength=n_experts)
    rows_SD = x_TD[pair_of_row_S // top_k]
    if group is None or group.size() == 1:
        counts = counts_E.tolist()
        total = [len(pair_of_row_S)]
        return rows_SD, DispatchPlan(
            pair_of_row_S, expert_ids_TK.numel(), top_k, total, total, None, counts, None
        )
    sent, received, coming_WE = _exchange_counts(counts_E, group)
    # Rows arrive by (source, expert); the experts want them by (expert, source).
    local_expert_WE = torch.arange(coming_WE.shape[1], device=x_TD.device).expand_as(coming_WE)
    local_expert_R = local_expert_WE.flatten().repeat_interleave(
        coming_WE.flatten(), output_size=sum(received)
    )
    by_expert_R = local_expert_R.argsort(stable=True)
    rows_RD = _AllToAll.apply(rows_SD, sent, received, group)[by_expert_R]
    plan = DispatchPlan(
        pair_of_row_S,
        expert_ids_TK.numel(),
        top_k,
        sent,
        received,
        by_expert_R,
        coming_WE.sum(dim=0).tolist(),
        group,
    )
    return rows_RD, plan


def combine(y_RD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
    """Bring the experts' outputs home and add them up by weight: [T, D] in y's dtype, summed in fp32.

    A dropped pair contributes nothing. Pairs are put in place rather than accumulated, so the sum's
    order never depends on the dispatch.
    """
    if plan.by_expert_R is not None:
        assert plan.group is not None
        arrival_RD = torch.empty_like(y_RD).index_copy(0, plan.by_expert_R, y_RD)
        y_RD = _AllToAll.apply(arrival_RD, plan.received, plan.sent, plan.group)
    pairs_PD = y_RD.new_zeros(plan.n_pairs, y_RD.shape[-1]).index_copy(0, plan.pair_of_row_S, y_RD)
    pairs_TKD = pairs_PD.unflatten(0, (-1, plan.top_k))
    return (pairs_TKD.float() * weights_TK.unsqueeze(-1)).sum(dim=1).to(y_RD.dtype)
