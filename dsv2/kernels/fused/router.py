"""The router's choice and its sums, one pass each (see dsv2/kernels/reference/router.py).

The product with the centroids multiplies in bf16 and sums in fp32. This is as exact as a cast of both to
fp32. Experts are columns. Each group is padded to a power of 2 columns, so that a group's best is a reduction
over one dimension. Of equal affinities the lower column wins.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels.types import Choice, SequenceSums

ROWS = 16  # tokens of one program
SUMMED = 32  # tokens of one program of the sums


@triton.jit
def _select(
    logits,
    affinity,
    ids,
    chosen,
    T,
    E: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute the softmax over all experts, and choose the K best experts of the M best groups."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, GROUPS * SIZE)
    each: tl.constexpr = E // G
    real = (column // SIZE < G) & (column % SIZE < each)
    at = t[:, None] * E + (column // SIZE * each + column % SIZE)[None, :]
    inside = (t < T)[:, None] & real[None, :]
    x = tl.load(logits + at, mask=inside, other=0.0)
    x = tl.where(real[None, :], x, float("-inf"))
    x = tl.exp(x - tl.max(x, 1)[:, None])
    s = x / tl.sum(x, 1)[:, None]
    tl.store(affinity + at, s, mask=inside)

    score = tl.where(real[None, :], s, -2.0)
    if M < G:
        best = tl.max(tl.reshape(score, (ROWS, GROUPS, SIZE)), 2)
        group = tl.arange(0, GROUPS)[None, :]
        limit = tl.zeros((ROWS, GROUPS), tl.float32) - 1.0  # of a closed group
        for _ in tl.static_range(M):
            hit = group == tl.argmax(best, 1)[:, None]
            limit = tl.where(hit, 2.0, limit)
            best = tl.where(hit, -3.0, best)
        limit = tl.broadcast_to(tl.expand_dims(limit, 2), (ROWS, GROUPS, SIZE))
        # A closed expert's -1 is below every affinity, even one that underflowed to 0.
        score = tl.minimum(score, tl.reshape(limit, (ROWS, GROUPS * SIZE)))
    for k in tl.static_range(K):
        top = tl.argmax(score, 1)
        highest = tl.max(score, 1)
        # Of a row of NaN it may be any column; no index may leave its range.
        expert = tl.minimum(top // SIZE * each + tl.minimum(top % SIZE, each - 1), E - 1)
        tl.store(ids + t * K + k, expert.to(tl.int64), mask=t < T)
        tl.store(chosen + t * K + k, highest, mask=t < T)
        score = tl.where(column[None, :] == top[:, None], -3.0, score)


@triton.jit
def _select_backward(
    affinity,
    ids,
    grad_chosen,
    grad_affinity,
    out,
    T,
    HAS_AFFINITY: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute the logits' gradient as a sum of two bf16 tensors: its rounding and the rounding error."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (t < T)[:, None] & (column < E)[None, :]
    at = t[:, None] * E + column[None, :]
    s = tl.load(affinity + at, mask=inside, other=0.0)
    g = tl.zeros((ROWS, COLUMNS), tl.float32)
    if HAS_AFFINITY:
        g += tl.load(grad_affinity + at, mask=inside, other=0.0)
    for k in tl.static_range(K):
        expert = tl.load(ids + t * K + k, mask=t < T, other=0)
        weight = tl.load(grad_chosen + t * K + k, mask=t < T, other=0.0)
        g += tl.where(column[None, :] == expert[:, None], weight[:, None], 0.0)
    grad = s * (g - tl.sum(s * g, 1)[:, None])
    high = grad.to(tl.bfloat16)
    at = t[:, None] * (2 * E) + column[None, :]
    tl.store(out + at, high, mask=inside)
    tl.store(out + at + E, (grad - high.to(tl.float32)).to(tl.bfloat16), mask=inside)


@triton.jit
def _sums(
    affinity,
    ids,
    chosen,
    out,
    S,
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum over some tokens of one sequence: affinity, selected, sent, entropy, top1."""
    sequence = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = part * ROWS + tl.arange(0, ROWS)
    t = sequence * S + row
    live = row < S
    column = tl.arange(0, COLUMNS)
    group = tl.arange(0, GROUPS)
    inside = live[:, None] & (column < E)[None, :]
    s = tl.load(affinity + t[:, None] * E + column[None, :], mask=inside, other=0.0)
    selected = tl.zeros((ROWS, COLUMNS), tl.float32)
    sent = tl.zeros((ROWS, GROUPS), tl.float32)
    for k in tl.static_range(K):
        expert = tl.load(ids + t * K + k, mask=live, other=-E)[:, None]
        selected += tl.where(column[None, :] == expert, 1.0, 0.0)
        sent = tl.where(group[None, :] * (E // G) == expert - expert % (E // G), 1.0, sent)
    entropy = tl.where(s > 0, -s * tl.log(tl.where(s > 0, s, 1.0)), 0.0)
    top1 = tl.load(chosen + t * K, mask=live, other=0.0)
    out += (sequence * tl.num_programs(1) + part) * (2 * E + G + 2)
    tl.store(out + column, tl.sum(s, 0), mask=column < E)
    tl.store(out + E + column, tl.sum(selected, 0), mask=column < E)
    tl.store(out + 2 * E + group, tl.sum(sent, 0), mask=group < G)
    tl.store(out + 2 * E + G, tl.sum(entropy))
    tl.store(out + 2 * E + G + 1, tl.sum(top1))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, centroids_ED: Tensor, top_k: int, n_group: int, topk_group: int):
        tokens = len(x_TD)
        experts = len(centroids_ED)
        logits_TE = torch.mm(x_TD, centroids_ED.t(), out_dtype=torch.float32)
        affinity_TE = torch.empty_like(logits_TE)
        ids_TK = torch.empty(tokens, top_k, dtype=torch.int64, device=x_TD.device)
        affinity_TK = logits_TE.new_empty(tokens, top_k)
        _select[(triton.cdiv(tokens, ROWS),)](
            logits=logits_TE,
            affinity=affinity_TE,
            ids=ids_TK,
            chosen=affinity_TK,
            T=tokens,
            E=experts,
            G=n_group,
            M=topk_group,
            K=top_k,
            GROUPS=triton.next_power_of_2(n_group),
            SIZE=triton.next_power_of_2(experts // n_group),
            ROWS=ROWS,
        )
        ctx.save_for_backward(x_TD, centroids_ED, ids_TK, affinity_TE)
        ctx.mark_non_differentiable(ids_TK)
        ctx.set_materialize_grads(False)
        return ids_TK, affinity_TK, affinity_TE

    @staticmethod
    def backward(ctx, _, grad_affinity_TK: Tensor | None, grad_affinity_TE: Tensor | None):
        x_TD, centroids_ED, ids_TK, affinity_TE = ctx.saved_tensors
        tokens, experts = affinity_TE.shape
        if grad_affinity_TK is None:
            grad_affinity_TK = affinity_TE.new_zeros(ids_TK.shape)
        grad_T2E = x_TD.new_empty(tokens, 2 * experts)
        _select_backward[(triton.cdiv(tokens, ROWS),)](
            affinity=affinity_TE,
            ids=ids_TK,
            grad_chosen=grad_affinity_TK.contiguous(),
            grad_affinity=affinity_TE if grad_affinity_TE is None else grad_affinity_TE.contiguous(),
            out=grad_T2E,
            T=tokens,
            HAS_AFFINITY=grad_affinity_TE is not None,
            E=experts,
            K=ids_TK.shape[1],
            COLUMNS=triton.next_power_of_2(experts),
            ROWS=ROWS,
        )
        grad_x = torch.mm(grad_T2E, torch.cat((centroids_ED, centroids_ED)))
        high_ED, low_ED = torch.mm(grad_T2E.t(), x_TD, out_dtype=torch.float32).chunk(2)
        return grad_x, (high_ED + low_ED).to(centroids_ED.dtype), None, None, None


class _SequenceSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, affinity_TE: Tensor, ids_TK: Tensor, affinity_TK: Tensor, n_sequences: int, n_group: int
    ):
        tokens, experts = affinity_TE.shape
        length = tokens // n_sequences
        grid = (n_sequences, triton.cdiv(length, SUMMED))
        parts = affinity_TE.new_empty(*grid, 2 * experts + n_group + 2)
        _sums[grid](
            affinity=affinity_TE,
            ids=ids_TK,
            chosen=affinity_TK,
            out=parts,
            S=length,
            E=experts,
            K=ids_TK.shape[1],
            G=n_group,
            COLUMNS=triton.next_power_of_2(experts),
            GROUPS=triton.next_power_of_2(n_group),
            ROWS=SUMMED,
        )
        ctx.length = length
        affinity_BE, constants = parts.sum(dim=1).split([experts, experts + n_group + 2], dim=1)
        ctx.mark_non_differentiable(constants)
        return affinity_BE, constants

    @staticmethod
    def backward(ctx, grad_BE: Tensor, _):
        grad_BSE = grad_BE.unsqueeze(1).expand(-1, ctx.length, -1)
        return grad_BSE.reshape(-1, grad_BE.shape[1]), None, None, None, None


def route(x_TD: Tensor, centroids_ED: Tensor, top_k: int, n_group: int, topk_group: int) -> Choice:
    return Choice(*_Route.apply(x_TD.contiguous(), centroids_ED, top_k, n_group, topk_group))


def sequence_sums(choice: Choice, n_sequences: int, n_group: int) -> SequenceSums:
    affinity_BE, constants = _SequenceSums.apply(
        choice.affinity_TE, choice.expert_ids_TK, choice.affinity_TK.detach(), n_sequences, n_group
    )
    sizes = [affinity_BE.shape[1], n_group, 1, 1]
    selected_BE, sent_BG, entropy_B1, top1_B1 = constants.split(sizes, dim=1)
    return SequenceSums(affinity_BE, selected_BE, sent_BG, entropy_B1.squeeze(1), top1_B1.squeeze(1))
