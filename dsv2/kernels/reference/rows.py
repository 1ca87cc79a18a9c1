"""Moving rows: copies of tokens' rows in another order, and weighted sums of rows back to their tokens.

Shapes: T tokens, J slots a token (an expert chosen, or a rank reached), P rows, D width. A `RowMap`
says which slot each row belongs to; `gather_rows` and `sum_rows` are each other's transposes, so the
backward of either is the other.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RowMap(NamedTuple):
    """P rows for some of the T * J slots, ordered by a key."""

    slot_P: Tensor  # int64: index into the T * J slots
    n_slots: int  # J

    def tokens(self) -> Tensor:
        """int64 [P]: the token of each row."""
        return self.slot_P // self.n_slots


def map_rows(key_TJ: Tensor, n_rows: int) -> RowMap:
    """The `n_rows` slots of lowest key, by rising key; equal keys stay in the order of their slots."""
    return RowMap(key_TJ.flatten().argsort(stable=True)[:n_rows], key_TJ.shape[1])


def gather_rows(x_TD: Tensor, rows: RowMap) -> Tensor:
    """[P, D]: each row a copy of its token's."""
    return x_TD.index_select(0, rows.tokens())


def sum_rows(y_PD: Tensor, rows: RowMap, n_tokens: int, weights_TJ: Tensor | None = None) -> Tensor:
    """[T, D] in y's dtype: each token's rows times their slots' weights (None: 1), added up in fp32 or finer.

    A slot without a row adds nothing. A token's rows are added up in the order of its slots, whoever
    else is there.
    """
    slots_P, order_P = rows.slot_P.sort()
    starts_T = torch.searchsorted(slots_P, torch.arange(n_tokens, device=slots_P.device) * rows.n_slots)
    terms_PD = y_PD.to(torch.promote_types(y_PD.dtype, torch.float32))
    weights_P = None if weights_TJ is None else weights_TJ.flatten()[slots_P].to(terms_PD.dtype)
    # A bag is a token's stretch of `order`; the sum over it is what torch calls an embedding of the bag.
    sums_TD = F.embedding_bag(order_P, terms_PD, starts_T, mode="sum", per_sample_weights=weights_P)
    return sums_TD.to(y_PD.dtype)
