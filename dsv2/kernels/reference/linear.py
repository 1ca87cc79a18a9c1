"""Products of several matrices with the same input."""

import torch.nn.functional as F
from torch import Tensor


def linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Return x W^T for each weight [width, input width]."""
    return tuple(F.linear(x, weight) for weight in weights)
