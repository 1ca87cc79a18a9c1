"""Turning pairs of a head's dimensions by their position's angle.

Shapes: B batch, S sequence, H heads, R rotary dimensions of a head, P = R / 2 interleaved pairs.
"""

import torch
from torch import Tensor


def apply_rope(x_BSHR: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
    """Turn each interleaved pair of x by its position's angle; computed in fp32, returned in x's dtype.

    The tables are [S, P], or [B, S, P] where sequences stand at positions of their own.
    """
    even_BSHP, odd_BSHP = x_BSHR.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos_S1P, sin_S1P = cos_SP.unsqueeze(-2), sin_SP.unsqueeze(-2)
    turned = torch.stack(
        (even_BSHP * cos_S1P - odd_BSHP * sin_S1P, even_BSHP * sin_S1P + odd_BSHP * cos_S1P), dim=-1
    )
    return turned.flatten(-2).to(x_BSHR.dtype)
