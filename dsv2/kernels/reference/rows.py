"""Move rows: copy tokens' rows into another order, and sum rows, weighted, back to their tokens.

A `RowMap` says which slot each row belongs to. `copy_rows` and `sum_rows` are each other's transposes, so
the backward pass of either is the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.kernels.types import RowMap


def map_rows(keys: Tensor, n_rows: int) -> RowMap:
    """Return the `n_rows` slots with the lowest keys, by rising key, then by slot.

    Args:
        keys: [T, slots per token].
    """
    slots = keys.flatten().argsort(stable=True)[:n_rows]
    places = torch.full((keys.numel(),), -1, dtype=torch.int32, device=keys.device)
    places[slots] = torch.arange(n_rows, dtype=torch.int32, device=keys.device)
    return RowMap(slots, places.view(keys.shape))


def rows_by_rank(expert_ids_TK: Tensor, n_local: int, n_ranks: int) -> tuple[RowMap, Tensor]:
    """Return a row for each (token, rank) with an expert of the token, and each rank's number of rows."""
    ranks_TK = expert_ids_TK.div(n_local, rounding_mode="floor")  # -1 stays -1
    reached_TW = torch.zeros(len(ranks_TK), n_ranks + 1, dtype=torch.bool, device=ranks_TK.device)
    reached_TW = reached_TW.scatter_(1, ranks_TK + 1, True)[:, 1:]
    ranks_TW = torch.arange(n_ranks, device=ranks_TK.device).where(reached_TW, n_ranks)
    rows = map_rows(ranks_TW, ranks_TW.numel())
    return RowMap(rows.slots, rows.places.where(reached_TW, -1)), reached_TW.sum(dim=0)


def copy_rows(x_TD: Tensor, rows: RowMap) -> Tensor:
    """Return, for each row, a copy of its token's hidden state, [rows, D]."""
    return x_TD.index_select(0, rows.tokens())


def sum_rows(y: Tensor, rows: RowMap, n_tokens: int, weights: Tensor | None = None) -> Tensor:
    """Return [T, D] in y's dtype: the sum of each token's rows of y [rows, D], summed in fp32 or finer.

    A slot without a row adds nothing. A token's rows are summed in the order of its slots. No other row
    changes this order.

    Args:
        weights: of each slot, [T, slots per token]; None means 1.
    """
    slots, order = rows.slots.sort()
    starts_T = torch.searchsorted(slots, torch.arange(n_tokens, device=slots.device) * rows.n_slots)
    terms = y.to(torch.promote_types(y.dtype, torch.float32))
    row_weights = None if weights is None else weights.flatten()[slots].to(terms.dtype)
    # A bag is a token's range of `order`. torch calls the sum over it the embedding of the bag.
    sums_TD = F.embedding_bag(order, terms, starts_T, mode="sum", per_sample_weights=row_weights)
    return sums_TD.to(y.dtype)
