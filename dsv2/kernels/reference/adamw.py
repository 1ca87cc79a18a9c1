"""One AdamW step (Loshchilov & Hutter, arXiv 1711.05101) on a range of a parameter, and the norm before it.

All arithmetic is fp32. States kept in bf16 are rounded stochastically. Rounding to nearest would lose every
update smaller than 1/256 of its weight. In a long run, most updates are that small.
"""

import torch
from torch import Tensor

from dsv2.kernels.types import AdamWStep

MASK = 0xFFFFFFFF  # of 32 bits


def adamw(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    scale: Tensor,
    weight: Tensor | None,
    hyper: AdamWStep,
    first: int,
) -> None:
    """Update weights and moments in place; see OptimizerKernels."""
    if scale.isnan():
        return
    grad = grad.float() * scale
    mean = exp_avg.float().lerp_(grad, 1 - hyper.beta1)
    square = exp_avg_sq.float().mul_(hyper.beta2).addcmul_(grad, grad, value=1 - hyper.beta2)
    corrected_mean = 1 - hyper.beta1**hyper.step
    corrected_square = 1 - hyper.beta2**hyper.step
    denominator = torch.div(square, corrected_square, out=grad).sqrt_().add_(hyper.eps)
    new = master.float().mul_(1 - hyper.lr * hyper.weight_decay)
    new.addcdiv_(mean, denominator, value=-hyper.lr / corrected_mean)
    if master.dtype == torch.bfloat16:
        bits = random_bits(hyper, first, len(master), master.device)
        master.copy_(round_stochastically(new, bits & 0xFFFF))
        exp_avg.copy_(round_stochastically(mean, bits >> 16))
        exp_avg_sq.copy_(round_stochastically(square, (bits * 0x9E3779B1 & MASK) >> 16))
    if weight is not None:
        weight.copy_(new)


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Return the sum over all elements of all tensors, fp32 []."""
    return torch.stack([torch.linalg.vector_norm(x, dtype=torch.float32) for x in tensors]).square().sum()


def random_bits(hyper: AdamWStep, first: int, count: int, device: torch.device) -> Tensor:
    """Return 32 random bits per element as int64 [count]: a hash of seed, step and index."""
    x = torch.arange(first, first + count, device=device) & MASK
    x = (x * 0x9E3779B1 + hyper.seed + hyper.step * 0x632BE5AB) & MASK
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * multiplier) & MASK
    return x ^ (x >> 16)


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """Return x as bf16: one of its two neighbours, the nearer one more often.

    Args:
        bits: 16 random bits per element.
    """
    return ((x.view(torch.int32) + bits.int()) & -0x10000).view(torch.float32).bfloat16()
