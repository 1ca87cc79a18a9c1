"""Moving rows: copies of tokens' rows in another order, and weighted sums of rows back to their tokens.

Shapes: T tokens, J slots a token (an expert chosen, or a rank reached), P rows, D width. A `RowMap`
says which slot each row belongs to; `gather_rows` and `sum_rows` are each other's transposes, so the
backward of either is the other.
"""

from typing import NamedTuple

import torch
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
    return x_TD[rows.tokens()]


def sum_rows(y_PD: Tensor, weights_TJ: Tensor | None, rows: RowMap, n_tokens: int) -> Tensor:
    """[T, D] in y's dtype: each token's rows times their slots' weights (None: 1), added up in fp32 or finer.

    A slot without a row adds nothing. Rows are put in place rather than accumulated, so that the order
    of a token's sum is that of its slots, whoever else is there.
    """
    slots_SD = y_PD.new_zeros(n_tokens * rows.n_slots, y_PD.shape[-1]).index_copy(0, rows.slot_P, y_PD)
    slots_TJD = slots_SD.unflatten(0, (n_tokens, rows.n_slots))
    slots_TJD = slots_TJD.to(torch.promote_types(y_PD.dtype, torch.float32))
    if weights_TJ is not None:
        slots_TJD = slots_TJD * weights_TJ.unsqueeze(-1)
    return slots_TJD.sum(dim=1).to(y_PD.dtype)
