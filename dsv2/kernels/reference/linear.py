"""Several matrices that multiply the same input.

Shapes: D input width; any leading dimensions.
"""

import torch.nn.functional as F
from torch import Tensor


def linears(x_D: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x W^T for each weight [width, D]."""
    return tuple(F.linear(x_D, weight) for weight in weights)
