"""One step of AdamW (Loshchilov & Hutter, arXiv 1711.05101) on a stretch of a parameter; the norm before it.

Shapes: N elements of the stretch. All arithmetic is fp32. States kept in bf16 are rounded
stochastically: rounded to nearest, a weight would stand still whenever its update is below a 256th
of it, which most updates of a long run are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MASK = 0xFFFFFFFF  # of 32 bits


class AdamWStep(NamedTuple):
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int  # of Adam, counted from 1
    seed: int  # of the stochastic rounding, 0 .. 2^31 - 1; the parameter's own


def adamw(
    master_N: Tensor,
    exp_avg_N: Tensor,
    exp_avg_sq_N: Tensor,
    grad_N: Tensor,
    scale: Tensor,
    weight_N: Tensor | None,
    hyper: AdamWStep,
    first: int,
) -> None:
    """Update weights and moments in place.

    Args:
        master_N: the weights that the optimizer keeps, fp32 or bf16, as the moments are.
        grad_N: fp32 or bf16.
        scale: fp32 [], the gradient is multiplied by it; NaN: nothing is changed.
        weight_N: the model's bf16 copy of the weights, to be written too; None where it is the master.
        first: index of the stretch's first element in the whole parameter. Rounding depends on the seed,
            the step and an element's index alone, so that no layout changes it.
    """
    if scale.isnan():
        return
    grad_N = grad_N.float() * scale
    mean_N = exp_avg_N.float().lerp_(grad_N, 1 - hyper.beta1)
    square_N = exp_avg_sq_N.float().mul_(hyper.beta2).addcmul_(grad_N, grad_N, value=1 - hyper.beta2)
    corrected_mean, corrected_square = 1 - hyper.beta1**hyper.step, 1 - hyper.beta2**hyper.step
    denominator_N = torch.div(square_N, corrected_square, out=grad_N).sqrt_().add_(hyper.eps)
    new_N = master_N.float().mul_(1 - hyper.lr * hyper.weight_decay)
    new_N.addcdiv_(mean_N, denominator_N, value=-hyper.lr / corrected_mean)
    if master_N.dtype == torch.bfloat16:
        bits_N = random_bits(hyper, first, len(master_N), master_N.device)
        master_N.copy_(round_stochastically(new_N, bits_N & 0xFFFF))
        exp_avg_N.copy_(round_stochastically(mean_N, bits_N >> 16))
        exp_avg_sq_N.copy_(round_stochastically(square_N, (bits_N * 0x9E3779B1 & MASK) >> 16))
    if weight_N is not None:
        weight_N.copy_(new_N)


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """fp32 []: over all elements of all tensors."""
    return torch.stack([torch.linalg.vector_norm(x, dtype=torch.float32) for x in tensors]).square().sum()


def random_bits(hyper: AdamWStep, first: int, count: int, device: torch.device) -> Tensor:
    """int64 [N] of 32 random bits: a hash of seed, step and index."""
    x_N = torch.arange(first, first + count, device=device) & MASK
    x_N = (x_N * 0x9E3779B1 + hyper.seed + hyper.step * 0x632BE5AB) & MASK
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x_N = ((x_N ^ (x_N >> shift)) * multiplier) & MASK
    return x_N ^ (x_N >> 16)


def round_stochastically(x_N: Tensor, bits_N: Tensor) -> Tensor:
    """bf16 [N]: of the two neighbours, each as likely as x is near to it. `bits`: 16 random ones."""
    return ((x_N.view(torch.int32) + bits_N.int()) & -0x10000).view(torch.float32).bfloat16()
