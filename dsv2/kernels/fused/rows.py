"""Moving rows (see dsv2/kernels/reference/rows.py): one pass over the bytes, no atomics, fp32 sums.

Shapes: T tokens, J slots a token, P rows, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels.reference.rows import RowMap

BLOCK = 2048
SORTED, STEP = 128, 32  # slots of one program of the sort, and how many of them are compared at once


@triton.jit
def _copy(x, slot_P, out, J: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(slot_P + row) // J
    for start in tl.static_range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        tl.store(out + row * D + d, tl.load(x + token * D + d, mask=d < D), mask=d < D)


@triton.jit
def _sum(
    y,
    place_TJ,
    weight_TJ,
    out,
    J: tl.constexpr,
    D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
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
                value *= tl.load(weight_TJ + token * J + j)
            total += value
        tl.store(out + token * D + d, total.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _histogram(key_N, count_KB, N, KEYS: tl.constexpr, SORTED: tl.constexpr):
    """How often each key occurs in a block of consecutive slots."""
    block = tl.program_id(0)
    n = block * SORTED + tl.arange(0, SORTED)
    key = tl.load(key_N + n, mask=n < N, other=KEYS - 1).to(tl.int32)
    count = tl.histogram(key, KEYS)
    tl.store(count_KB + tl.arange(0, KEYS) * tl.num_programs(0) + block, count)


@triton.jit
def _place(key_N, count_KB, end_KB, slot_P, place_N, N, P, absent, SORTED: tl.constexpr, STEP: tl.constexpr):
    """Each slot's row: behind those of lower keys, of earlier blocks, and of earlier slots of its block."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    own = tl.arange(0, SORTED)
    n = block * SORTED + own
    key = tl.load(key_N + n, mask=n < N, other=0).to(tl.int32)
    row = tl.load(end_KB + key * blocks + block) - tl.load(count_KB + key * blocks + block)
    for start in tl.static_range(0, SORTED, STEP):
        other = start + tl.arange(0, STEP)
        m = block * SORTED + other
        other_key = tl.load(key_N + m, mask=m < N, other=-1).to(tl.int32)
        before = (other_key[None, :] == key[:, None]) & (other[None, :] < own[:, None])
        row += tl.sum(before.to(tl.int32), 1)
    tl.store(slot_P + row, n.to(tl.int64), mask=(n < N) & (row < P))
    tl.store(place_N + n, tl.where(key == absent, -1, row), mask=n < N)


def sort_slots(key_TJ: Tensor, n_keys: int, n_rows: int) -> tuple[RowMap, Tensor, Tensor]:
    """A stable counting sort: `map_rows` of int16 keys 0 .. `n_keys`, of which `n_keys` means absent.

    Returns:
        The first `n_rows` slots by key; each slot's row, -1 for absent ones, int32 [T, J]; and where
        each key's rows end, int32 [n_keys].
    """
    slots = key_TJ.numel()
    blocks, keys = triton.cdiv(slots, SORTED), triton.next_power_of_2(n_keys + 2)  # one is for padding
    slot_P = torch.empty(n_rows, dtype=torch.int64, device=key_TJ.device)
    place_TJ = torch.empty(key_TJ.shape, dtype=torch.int32, device=key_TJ.device)
    if not slots:
        ends = torch.zeros(n_keys, dtype=torch.int32, device=key_TJ.device)
        return RowMap(slot_P, key_TJ.shape[1]), place_TJ, ends
    count_KB = torch.empty(keys, blocks, dtype=torch.int32, device=key_TJ.device)
    _histogram[(blocks,)](key_TJ, count_KB, slots, keys, SORTED)
    end_KB = count_KB.view(-1).cumsum(0, dtype=torch.int32).view(keys, blocks)
    tensors = (key_TJ, count_KB, end_KB, slot_P, place_TJ)
    _place[(blocks,)](*tensors, slots, n_rows, n_keys, SORTED, STEP)
    return RowMap(slot_P, key_TJ.shape[1]), place_TJ, end_KB[:n_keys, -1].contiguous()


def places(rows: RowMap, n_tokens: int) -> Tensor:
    """int32 [T, J]: the row of each slot, -1 for a slot without one."""
    place = torch.full((n_tokens * rows.n_slots,), -1, dtype=torch.int32, device=rows.slot_P.device)
    numbers = torch.arange(len(rows.slot_P), dtype=torch.int32, device=place.device)
    return place.index_copy_(0, rows.slot_P, numbers).view(n_tokens, rows.n_slots)


def copy_rows(x_TD: Tensor, rows: RowMap, length: int | None = None) -> Tensor:
    """[P, D], or [length, D] of which the rows beyond P are uninitialised; no gradient."""
    n_rows, width = len(rows.slot_P), x_TD.shape[1]
    out = x_TD.new_empty(n_rows if length is None else length, width)
    if n_rows and width:
        _copy[(n_rows,)](x_TD.contiguous(), rows.slot_P, out, rows.n_slots, width, BLOCK)
    return out


def add_rows(y_PD: Tensor, place_TJ: Tensor, weight_TJ: Tensor | None = None) -> Tensor:
    """[T, D]: each token's rows, times their fp32 weights if given, added up; no gradient."""
    out = y_PD.new_empty(len(place_TJ), y_PD.shape[1])
    if out.numel():
        weight, weighted = (y_PD, False) if weight_TJ is None else (weight_TJ, True)
        widths = (place_TJ.shape[1], out.shape[1])
        _sum[(len(out),)](y_PD, place_TJ, weight, out, *widths, weighted, BLOCK)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, rows: RowMap) -> Tensor:
        ctx.rows, ctx.n_tokens = rows, len(x_TD)
        return copy_rows(x_TD, rows)

    @staticmethod
    def backward(ctx, grad_PD: Tensor):
        return add_rows(grad_PD.contiguous(), places(ctx.rows, ctx.n_tokens)), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_PD: Tensor, rows: RowMap, n_tokens: int) -> Tensor:
        ctx.rows = rows
        return add_rows(y_PD.contiguous(), places(rows, n_tokens))

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        return copy_rows(grad_TD.contiguous(), ctx.rows), None, None


def gather_rows(x_TD: Tensor, rows: RowMap) -> Tensor:
    return _Gather.apply(x_TD, rows)


def sum_rows(y_PD: Tensor, rows: RowMap, n_tokens: int) -> Tensor:
    return _Sum.apply(y_PD, rows, n_tokens)
