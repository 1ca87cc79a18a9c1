"""A SwiGLU network (Shazeer, arXiv 2002.05202)."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """Return down (silu(gate x) * up x), [..., D]."""
    return F.linear(F.silu(F.linear(x, gate_FD)) * F.linear(x, up_FD), down_DF)
