"""Moving rows (see dsv2/kernels/rows.py): one pass over the bytes, no atomics, fp32 sums.

Shapes: T tokens, J slots a token, P rows, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels.rows import RowMap

BLOCK = 2048


@triton.jit
def _copy(x, slot_P, out, J: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(slot_P + row) // J
    for start in tl.static_range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        tl.store(out + row * D + d, tl.load(x + token * D + d, mask=d < D), mask=d < D)


@triton.jit
def _sum(
    y, weight, place_TJ, out, HAS_WEIGHT: tl.constexpr, J: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    for start in tl.static_range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for j in tl.static_range(J):
            row = tl.load(place_TJ + token * J + j).to(tl.int64)
            width = tl.where(row >= 0, D, 0)  # a slot without a row reads nothing
            value = tl.load(y + row * D + d, mask=d < width, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                value *= tl.load(weight + token * J + j)
            total += value
        tl.store(out + token * D + d, total.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _sum_backward(
    grad_out, y, weight, slot_P, grad_y, grad_weight, J: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_P + row)
    token = slot // J
    factor = tl.load(weight + slot)
    dot = 0.0
    for start in tl.static_range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        g = tl.load(grad_out + token * D + d, mask=d < D, other=0.0).to(tl.float32)
        value = tl.load(y + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        dot += tl.sum(g * value, 0)
        tl.store(grad_y + row * D + d, (g * factor).to(grad_y.dtype.element_ty), mask=d < D)
    tl.store(grad_weight + slot, dot)


def places(rows: RowMap, n_tokens: int) -> Tensor:
    """int32 [T, J]: the row of each slot, -1 for a slot without one."""
    place = torch.full((n_tokens * rows.n_slots,), -1, dtype=torch.int32, device=rows.slot_P.device)
    numbers = torch.arange(len(rows.slot_P), dtype=torch.int32, device=place.device)
    return place.index_copy_(0, rows.slot_P, numbers).view(n_tokens, rows.n_slots)


def copy_rows(x_TD: Tensor, rows: RowMap) -> Tensor:
    """[P, D]; no gradient."""
    out = x_TD.new_empty(len(rows.slot_P), x_TD.shape[1])
    if out.numel():
        width = x_TD.shape[1]
        _copy[(len(out),)](x_TD.contiguous(), rows.slot_P, out, rows.n_slots, width, BLOCK)
    return out


def add_rows(y_PD: Tensor, weights_TJ: Tensor | None, place_TJ: Tensor) -> Tensor:
    """[T, D]: each token's rows, weighted and added up; no gradient."""
    out = y_PD.new_empty(len(place_TJ), y_PD.shape[1])
    if out.numel():
        weight = y_PD if weights_TJ is None else weights_TJ
        has_weight = weights_TJ is not None
        _sum[(len(out),)](y_PD, weight, place_TJ, out, has_weight, place_TJ.shape[1], out.shape[1], BLOCK)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, rows: RowMap) -> Tensor:
        ctx.rows, ctx.n_tokens = rows, len(x_TD)
        return copy_rows(x_TD, rows)

    @staticmethod
    def backward(ctx, grad_PD: Tensor):
        return add_rows(grad_PD.contiguous(), None, places(ctx.rows, ctx.n_tokens)), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_PD: Tensor, weights_TJ: Tensor | None, rows: RowMap, n_tokens: int) -> Tensor:
        ctx.rows = rows
        if weights_TJ is not None:
            ctx.save_for_backward(y_PD, weights_TJ)
        return add_rows(y_PD.contiguous(), weights_TJ, places(rows, n_tokens))

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        grad_TD = grad_TD.contiguous()
        if not ctx.saved_tensors:
            return copy_rows(grad_TD, ctx.rows), None, None, None
        y_PD, weights_TJ = ctx.saved_tensors
        grad_PD, grad_weights = torch.empty_like(y_PD), torch.zeros_like(weights_TJ)
        if len(y_PD):
            width, slots = y_PD.shape[1], ctx.rows.n_slots
            arguments = (grad_TD, y_PD, weights_TJ, ctx.rows.slot_P, grad_PD, grad_weights)
            _sum_backward[(len(y_PD),)](*arguments, slots, width, BLOCK)
        return grad_PD, grad_weights, None, None


def gather_rows(x_TD: Tensor, rows: RowMap) -> Tensor:
    return _Gather.apply(x_TD, rows)


def sum_rows(y_PD: Tensor, weights_TJ: Tensor | None, rows: RowMap, n_tokens: int) -> Tensor:
    weights = None if weights_TJ is None else weights_TJ.float().contiguous()
    return _Sum.apply(y_PD, weights, rows, n_tokens)
