"""Move rows: copy tokens' rows into another order, and sum rows, weighted, back to their tokens.

A `RowMap` says which slot each row belongs to. `gather_rows` and `sum_rows` are each other's transposes, so
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
    return RowMap(keys.flatten().argsort(stable=True)[:n_rows], keys.shape[1])


def gather_rows(x_TD: Tensor, rows: RowMap) -> Tensor:
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
