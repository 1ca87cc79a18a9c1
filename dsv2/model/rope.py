"""Rotary position embedding of the decoupled query and key (arXiv 2405.04434, eqs. 39 and 43).

Shapes: B batch, S sequence, H heads, R rotary dimensions of a head, P = R / 2 pairs.
The pairs are interleaved, (x0, x1), (x2, x3), ..., as in the published weights.
"""

import torch
from torch import Tensor


def rope_tables(length: int, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, fp32 [S, P]; pair i turns by theta^(-2i/dim) a position.

    They are made anew where they are used, never kept as buffers: a buffer would be cast to bf16 with
    the module, and an angle of thousands of radians in bf16 is noise.
    """
    exponents_P = torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim
    positions_S = torch.arange(length, device=device, dtype=torch.float64)
    angles_SP = torch.outer(positions_S, theta**-exponents_P)
    return angles_SP.cos().float(), angles_SP.sin().float()


def apply_rope(x_BSHR: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
    """Turn each interleaved pair of x by its position's angle; computed in fp32, returned in x's dtype."""
    even_BSHP, odd_BSHP = x_BSHR.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos_S1P, sin_S1P = cos_SP.unsqueeze(-2), sin_SP.unsqueeze(-2)
    turned = torch.stack(
        (even_BSHP * cos_S1P - odd_BSHP * sin_S1P, even_BSHP * sin_S1P + odd_BSHP * cos_S1P), dim=-1
    )
    return turned.flatten(-2).to(x_BSHR.dtype)
