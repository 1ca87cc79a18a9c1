"""RMSNorm (Zhang & Sennrich, arXiv 1910.07467), alone and with the residual sum; and plain sums."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight in x's dtype, where rms(x) = sqrt(mean(x^2) + eps)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, change: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + change (or x) and its RMSNorm: the residual stream, and the input of the next block.

    Continue with the returned x, not with the argument. Only then can the fused backward pass add its
    gradient while it computes the norm's.
    """
    if change is not None:
        x = x + change
    return x, rms_norm(x, weight, eps)


def add_up(x: Tensor, *terms: Tensor) -> Tensor:
    """Return the sum of tensors of one shape."""
    for term in terms:
        x = x + term
    return x
