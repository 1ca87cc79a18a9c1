"""A SwiGLU network (Shazeer, arXiv 2002.05202).

Shapes: D hidden_size, F width; any leading dimensions.
"""

import torch.nn.functional as F
from torch import Tensor


def swiglu(x_D: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """down (silu(gate x) * up x), [..., D]."""
    return F.linear(F.silu(F.linear(x_D, gate_FD)) * F.linear(x_D, up_FD), down_DF)
