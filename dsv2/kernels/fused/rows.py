"""Move rows (see dsv2/kernels/reference/rows.py): one pass over the bytes, no atomics, fp32 sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels.types import RowMap

BLOCK = 2048
SORTED = 128  # slots of one program of the sort
STEP = 32  # of them are compared at once
TOKENS = 128  # tokens of one program that finds their ranks


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
def _key(keys, n, inside, first, absent):
    """Load keys, counted from `first`. Keys outside 0 .. `absent` - 1 become `absent`."""
    key = tl.load(keys + n, mask=inside, other=-1).to(tl.int32) - first
    return tl.where((key >= 0) & (key < absent), key, absent)


@triton.jit
def _histogram(keys, counts, n_slots, first, absent, KEYS: tl.constexpr, SORTED: tl.constexpr):
    """Count how often each key occurs in a block of consecutive slots."""
    block = tl.program_id(0)
    n = block * SORTED + tl.arange(0, SORTED)
    key = tl.where(n < n_slots, _key(keys, n, n < n_slots, first, absent), KEYS - 1)
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
    first,
    absent,
    SORTED: tl.constexpr,
    STEP: tl.constexpr,
):
    """Find each slot's row: after the rows of lower keys, earlier blocks, and earlier slots of its block."""
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    index = tl.arange(0, SORTED)
    n = block * SORTED + index
    key = _key(keys, n, n < n_slots, first, absent)
    row = tl.load(ends + key * blocks + block) - tl.load(counts + key * blocks + block)
    for start in tl.static_range(0, SORTED, STEP):
        other = start + tl.arange(0, STEP)
        m = block * SORTED + other
        other_key = tl.where(m < n_slots, _key(keys, m, m < n_slots, first, absent), -1)
        before = (other_key[None, :] == key[:, None]) & (other[None, :] < index[:, None])
        row += tl.sum(before.to(tl.int32), 1)
    tl.store(slots + row, n.to(tl.int64), mask=(n < n_slots) & (row < n_rows))
    tl.store(places + n, tl.where(key == absent, -1, row), mask=n < n_slots)


@triton.jit
def _ranks(
    ids,
    keys,
    T,
    K: tl.constexpr,
    W: tl.constexpr,
    LOCAL: tl.constexpr,
    RANKS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Write the rank w as the key of slot (token, w) if the token has an expert there, W if not."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    rank = tl.arange(0, RANKS)[None, :]
    key = tl.zeros((TOKENS, RANKS), tl.int32) + W
    for k in tl.static_range(K):
        expert = tl.load(ids + t * K + k, mask=t < T, other=-1).to(tl.int32)[:, None]
        key = tl.where((expert >= rank * LOCAL) & (expert < (rank + 1) * LOCAL), rank, key)
    tl.store(keys + t[:, None] * W + rank, key.to(tl.int16), mask=(t < T)[:, None] & (rank < W))


@triton.jit
def _pick(values, places, out, n_slots, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(places + n, mask=n < n_slots, other=-1)
    tl.store(out + n, tl.load(values + row, mask=row >= 0, other=0.0), mask=n < n_slots)


def pick(values: Tensor, places: Tensor) -> Tensor:
    """Return the value of each slot's row, 0 without one: [T, slots per token]; no gradient."""
    out = values.new_empty(places.shape)
    if out.numel():
        grid = (triton.cdiv(out.numel(), BLOCK),)
        _pick[grid](values=values, places=places, out=out, n_slots=out.numel(), BLOCK=BLOCK)
    return out


def sort_slots(keys: Tensor, first: int, n_keys: int, n_rows: int) -> tuple[RowMap, Tensor]:
    """Sort slots by counting, stably: `map_rows` of the keys `first` .. `first` + `n_keys` - 1.

    Args:
        keys: [T, slots per token]. Any other key means an absent slot.

    Returns:
        The first `n_rows` slots by key, where absent slots have no row. The end of each key's rows, int32
        [n_keys].
    """
    n_slots = keys.numel()
    blocks = triton.cdiv(n_slots, SORTED)
    padded_keys = triton.next_power_of_2(n_keys + 2)  # one key is for padding
    slots = torch.empty(n_rows, dtype=torch.int64, device=keys.device)
    places = torch.empty(keys.shape, dtype=torch.int32, device=keys.device)
    if not n_slots:
        ends = torch.zeros(n_keys, dtype=torch.int32, device=keys.device)
        return RowMap(slots, places), ends
    counts = torch.empty(padded_keys, blocks, dtype=torch.int32, device=keys.device)
    _histogram[(blocks,)](
        keys=keys,
        counts=counts,
        n_slots=n_slots,
        first=first,
        absent=n_keys,
        KEYS=padded_keys,
        SORTED=SORTED,
    )
    ends = counts.view(-1).cumsum(0, dtype=torch.int32).view(padded_keys, blocks)
    _place[(blocks,)](
        keys=keys,
        counts=counts,
        ends=ends,
        slots=slots,
        places=places,
        n_slots=n_slots,
        n_rows=n_rows,
        first=first,
        absent=n_keys,
        SORTED=SORTED,
        STEP=STEP,
    )
    return RowMap(slots, places), ends[:n_keys, -1].contiguous()


def rows_by_rank(expert_ids_TK: Tensor, n_local: int, n_ranks: int) -> tuple[RowMap, Tensor]:
    tokens, top_k = expert_ids_TK.shape
    keys = torch.empty(tokens, n_ranks, dtype=torch.int16, device=expert_ids_TK.device)
    if tokens:
        _ranks[(triton.cdiv(tokens, TOKENS),)](
            ids=expert_ids_TK,
            keys=keys,
            T=tokens,
            K=top_k,
            W=n_ranks,
            LOCAL=n_local,
            RANKS=triton.next_power_of_2(n_ranks),
            TOKENS=TOKENS,
        )
    rows, ends = sort_slots(keys, 0, n_ranks, keys.numel())
    return rows, ends.diff(prepend=ends.new_zeros(1)).long()


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


def sum_rows(y: Tensor, rows: RowMap, n_tokens: int) -> Tensor:
    return add_rows(y, rows.places)
