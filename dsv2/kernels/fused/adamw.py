"""AdamW in one pass over weights, moments and gradient.

Shapes: N elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels.reference.adamw import MASK, AdamWStep

BLOCK = 1024
SUMMED, PROGRAMS = 4096, 1056  # elements that a program of the squares' sum takes at once; how many there are


@triton.jit
def _rounded(x, bits, ROUND: tl.constexpr, to: tl.constexpr):
    if ROUND:
        raised = x.to(tl.uint32, bitcast=True) + bits
        x = (raised & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(to)


@triton.jit(do_not_specialize=["start"])
def _adamw(
    master,
    exp_avg,
    exp_avg_sq,
    grad,
    scale,
    weight,
    N,
    start,
    decay,
    rate,
    beta1_rest,
    beta2,
    beta2_rest,
    eps,
    corrected_square,
    HAS_WEIGHT: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale)
    live = at < tl.where(factor == factor, N, 0)  # NaN: nothing is changed
    g = tl.load(grad + at, mask=live, other=0.0).to(tl.float32) * factor
    m = tl.load(exp_avg + at, mask=live, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + at, mask=live, other=0.0).to(tl.float32)
    w = tl.load(master + at, mask=live, other=0.0).to(tl.float32)
    m += (g - m) * beta1_rest
    v = v * beta2 + g * g * beta2_rest
    w = w * decay - rate * (m / (tl.sqrt(v / corrected_square) + eps))
    bits = at.to(tl.uint32)
    if ROUND:
        bits = bits * 0x9E3779B1 + start.to(tl.uint32)
        bits = (bits ^ (bits >> 16)) * 0x7FEB352D
        bits = (bits ^ (bits >> 15)) * 0x846CA68B
        bits = bits ^ (bits >> 16)
    tl.store(master + at, _rounded(w, bits & 0xFFFF, ROUND, master.dtype.element_ty), mask=live)
    tl.store(exp_avg + at, _rounded(m, bits >> 16, ROUND, exp_avg.dtype.element_ty), mask=live)
    other = (bits * 0x9E3779B1) >> 16
    tl.store(exp_avg_sq + at, _rounded(v, other, ROUND, exp_avg_sq.dtype.element_ty), mask=live)
    if HAS_WEIGHT:
        tl.store(weight + at, w.to(weight.dtype.element_ty), mask=live)


@triton.jit
def _squares(x, out, N, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tl.cdiv(N, BLOCK * tl.num_programs(0))):
        at = (start * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < N, other=0.0).to(tl.float32)
        total += value * value
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    sums = torch.zeros(len(tensors), PROGRAMS, dtype=torch.float32, device=tensors[0].device)
    for x, own in zip(tensors, sums, strict=True):
        if x.numel():
            programs = min(PROGRAMS, triton.cdiv(x.numel(), SUMMED))
            _squares[(programs,)](x, own, x.numel(), SUMMED)
    return sums.sum()


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
    count = len(master_N)
    if count == 0:
        return
    start = (first * 0x9E3779B1 + hyper.seed + hyper.step * 0x632BE5AB) & MASK
    numbers = (
        1 - hyper.lr * hyper.weight_decay,
        hyper.lr / (1 - hyper.beta1**hyper.step),
        1 - hyper.beta1,
        hyper.beta2,
        1 - hyper.beta2,
        hyper.eps,
        1 - hyper.beta2**hyper.step,
    )
    weight, rounds = (master_N if weight_N is None else weight_N), master_N.dtype == torch.bfloat16
    tensors = (master_N, exp_avg_N, exp_avg_sq_N, grad_N, scale, weight)
    grid = (triton.cdiv(count, BLOCK),)
    _adamw[grid](*tensors, count, start, *numbers, weight_N is not None, rounds, BLOCK)
