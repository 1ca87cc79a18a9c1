"""RMSNorm (Zhang & Sennrich, arXiv 1910.07467), alone and in the residual stream, and the stream's sums.

Shapes: any leading dimensions, D width.
"""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, rms(x) = sqrt(mean(x^2) + eps), in x's dtype."""
    return F.rms_norm(x_D, weight_D.shape, weight_D, eps)


def add_rms_norm(x_D: Tensor, change_D: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + change, or x itself, and its RMSNorm): the stream that goes on and what a block works on.

    Whoever goes on with the x returned lets a fused backward add its gradient to the norm's on the way.
    """
    if change_D is not None:
        x_D = x_D + change_D
    return x_D, rms_norm(x_D, weight_D, eps)


def add_up(x_D: Tensor, *others_D: Tensor) -> Tensor:
    """The sum of tensors of one shape."""
    for other_D in others_D:
        x_D = x_D + other_D
    return x_D
