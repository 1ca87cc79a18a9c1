"""Rotary position embedding: each pair of a head's dimensions is rotated by its position's angle."""

import torch
from torch import Tensor


def apply_rope(x_BSHR: Tensor, cos_SA: Tensor, sin_SA: Tensor) -> Tensor:
    """Rotate each interleaved pair of x by its position's angle, in fp32; return it in x's dtype.

    The tables are [S, A], or [B, S, A] if every sequence has its own positions.
    """
    even_BSHA, odd_BSHA = x_BSHR.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos_S1A = cos_SA.unsqueeze(-2)
    sin_S1A = sin_SA.unsqueeze(-2)
    rotated = torch.stack(
        (even_BSHA * cos_S1A - odd_BSHA * sin_S1A, even_BSHA * sin_S1A + odd_BSHA * cos_S1A), dim=-1
    )
    return rotated.flatten(-2).to(x_BSHR.dtype)
