"""Move rows (see dsv2/kernels/reference/rows.py): one pass over the bytes, no atomics, fp32 sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels.types import RowMap

BLOCK = 2048
SORTED = 128  # slots of one program of the sort
STEP = 32  # of them are compared at once


@triton.jit
def _copy(x, slots, out, SLOTS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(slots + row) // SLOTS
    for start in tl.static_range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        tl.store(out + row * D + d, tl.load(x + token * D + d, mask=d < D), mask=d < D)


@triton.jit
def _sum(
    y,
    places,
    weights,
    out,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    for start in tl.static_range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for slot in tl.static_range(SLOTS):
            row = tl.load(places + token * SLOTS + slot).to(tl.int64)
            width = tl.where(row >= 0, D, 0)  # a slot without a row reads nothing
            value = tl.load(y + row * D + d, mask=d < width, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                value *= tl.load(weights + token * SLOTS + slot)
            total += value
        tl.store(out + token * D + d, total.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _histogram(keys, counts, n_slots, KEYS: tl.constexpr, SORTED: tl.constexpr):
    """Count how often each key occurs in a block of consecutive slots."""
    block = tl.program_id(0)
    n = block * SORTED + tl.arange(0, SORTED)
    key = tl.load(keys + n, mask=n < n_slots, other=KEYS - 1).to(tl.int32)
    count = tl.histogram(key, KEYS)
    tl.store(counts + tl.arange(0, KEYS) * tl.num_programs(0) + block, count)


@triton.jit
def _place(
    keys,
    counts,
    ends,
    slots,
    places,
    n_slots,
    n_rows,
    absent,
    SORTED: tl.constexpr,
    STEP: tl.constexpr,
):
    """Find each slot's row: after the rows of lower keys, earlier blocks, and earlier slots of its block."""
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    index = tl.arange(0, SORTED)
    n = block * SORTED + index
    key = tl.load(keys + n, mask=n < n_slots, other=0).to(tl.int32)
    row = tl.load(ends + key * blocks + block) - tl.load(counts + key * blocks + block)
    for start in tl.static_range(0, SORTED, STEP):
        other = start + tl.arange(0, STEP)
        m = block * SORTED + other
        other_key = tl.load(keys + m, mask=m < n_slots, other=-1).to(tl.int32)
        before = (other_key[None, :] == key[:, None]) & (other[None, :] < index[:, None])
        row += tl.sum(before.to(tl.int32), 1)
    tl.store(slots + row, n.to(tl.int64), mask=(n < n_slots) & (row < n_rows))
    tl.store(places + n, tl.where(key == absent, -1, row), mask=n < n_slots)


def sort_slots(keys: Tensor, n_keys: int, n_rows: int) -> tuple[RowMap, Tensor, Tensor]:
    """Sort slots by counting, stably: `map_rows` of int16 keys 0 .. `n_keys`, of which `n_keys` means absent.

    Args:
        keys: [T, slots per token].

    Returns:
        The first `n_rows` slots by key. Each slot's row, int32 [T, slots per token], -1 if absent. The end of
        each key's rows, int32 [n_keys].
    """
    n_slots = keys.numel()
    blocks = triton.cdiv(n_slots, SORTED)
    padded_keys = triton.next_power_of_2(n_keys + 2)  # one key is for padding
    slots = torch.empty(n_rows, dtype=torch.int64, device=keys.device)
    places = torch.empty(keys.shape, dtype=torch.int32, device=keys.device)
    if not n_slots:
        ends = torch.zeros(n_keys, dtype=torch.int32, device=keys.device)
        return RowMap(slots, keys.shape[1]), places, ends
    counts = torch.empty(padded_keys, blocks, dtype=torch.int32, device=keys.device)
    _histogram[(blocks,)](keys=keys, counts=counts, n_slots=n_slots, KEYS=padded_keys, SORTED=SORTED)
    ends = counts.view(-1).cumsum(0, dtype=torch.int32).view(padded_keys, blocks)
    _place[(blocks,)](
        keys=keys,
        counts=counts,
        ends=ends,
        slots=slots,
        places=places,
        n_slots=n_slots,
        n_rows=n_rows,
        absent=n_keys,
        SORTED=SORTED,
        STEP=STEP,
    )
    return RowMap(slots, keys.shape[1]), places, ends[:n_keys, -1].contiguous()


def rows_of_slots(rows: RowMap, n_tokens: int) -> Tensor:
    """Return the row of each slot, -1 for a slot without one: int32 [T, slots per token]."""
    places = torch.full((n_tokens * rows.n_slots,), -1, dtype=torch.int32, device=rows.slots.device)
    numbers = torch.arange(len(rows.slots), dtype=torch.int32, device=places.device)
    return places.index_copy_(0, rows.slots, numbers).view(n_tokens, rows.n_slots)


def copy_rows(x_TD: Tensor, rows: RowMap, length: int | None = None) -> Tensor:
    """Return, for each row, a copy of its token's hidden state, [rows, D]; no gradient.

    Args:
        length: rows of the result; None means as many as `rows` has. Additional rows are uninitialised.
    """
    n_rows = len(rows.slots)
    width = x_TD.shape[1]
    out = x_TD.new_empty(n_rows if length is None else length, width)
    if n_rows and width:
        _copy[(n_rows,)](
            x=x_TD.contiguous(), slots=rows.slots, out=out, SLOTS=rows.n_slots, D=width, BLOCK=BLOCK
        )
    return out


def add_rows(y: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return [T, D], the sum of each token's rows of y, times their fp32 weights if any; no gradient.

    Args:
        places: each slot's row, int32 [T, slots per token].
        weights: of each slot.
    """
    out = y.new_empty(len(places), y.shape[1])
    if out.numel():
        _sum[(len(out),)](
            y=y,
            places=places,
            weights=y if weights is None else weights,
            out=out,
            SLOTS=places.shape[1],
            D=out.shape[1],
            HAS_WEIGHT=weights is not None,
            BLOCK=BLOCK,
        )
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, rows: RowMap) -> Tensor:
        ctx.rows = rows
        ctx.n_tokens = len(x_TD)
        return copy_rows(x_TD, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return add_rows(grad.contiguous(), rows_of_slots(ctx.rows, ctx.n_tokens)), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, rows: RowMap, n_tokens: int) -> Tensor:
        ctx.rows = rows
        return add_rows(y.contiguous(), rows_of_slots(rows, n_tokens))

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        return copy_rows(grad_TD.contiguous(), ctx.rows), None, None


def gather_rows(x_TD: Tensor, rows: RowMap) -> Tensor:
    return _Gather.apply(x_TD, rows)


def sum_rows(y: Tensor, rows: RowMap, n_tokens: int) -> Tensor:
    return _Sum.apply(y, rows, n_tokens)
