"""AdamW in one pass over weights, moments and gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels.reference.adamw import MASK
from dsv2.kernels.types import AdamWStep

BLOCK = 1024
SUMMED = 4096  # elements that a program of the sum of squares takes at once
PROGRAMS = 1056  # of the sum of squares


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
    count,
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
    live = at < tl.where(factor == factor, count, 0)  # NaN changes nothing
    g = tl.load(grad + at, mask=live, other=0.0).to(tl.float32) * factor
    mean = tl.load(exp_avg + at, mask=live, other=0.0).to(tl.float32)
    square = tl.load(exp_avg_sq + at, mask=live, other=0.0).to(tl.float32)
    w = tl.load(master + at, mask=live, other=0.0).to(tl.float32)
    mean += (g - mean) * beta1_rest
    square = square * beta2 + g * g * beta2_rest
    w = w * decay - rate * (mean / (tl.sqrt(square / corrected_square) + eps))
    bits = at.to(tl.uint32)
    if ROUND:
        bits = bits * 0x9E3779B1 + start.to(tl.uint32)
        bits = (bits ^ (bits >> 16)) * 0x7FEB352D
        bits = (bits ^ (bits >> 15)) * 0x846CA68B
        bits = bits ^ (bits >> 16)
    tl.store(master + at, _rounded(w, bits & 0xFFFF, ROUND, master.dtype.element_ty), mask=live)
    tl.store(exp_avg + at, _rounded(mean, bits >> 16, ROUND, exp_avg.dtype.element_ty), mask=live)
    mixed = (bits * 0x9E3779B1) >> 16
    tl.store(exp_avg_sq + at, _rounded(square, mixed, ROUND, exp_avg_sq.dtype.element_ty), mask=live)
    if HAS_WEIGHT:
        tl.store(weight + at, w.to(weight.dtype.element_ty), mask=live)


@triton.jit
def _squares(x, out, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tl.cdiv(count, BLOCK * tl.num_programs(0))):
        at = (start * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
        total += value * value
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    sums = torch.zeros(len(tensors), PROGRAMS, dtype=torch.float32, device=tensors[0].device)
    for x, partial_sums in zip(tensors, sums, strict=True):
        if x.numel():
            grid = (min(PROGRAMS, triton.cdiv(x.numel(), SUMMED)),)
            _squares[grid](x=x, out=partial_sums, count=x.numel(), BLOCK=SUMMED)
    return sums.sum()


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
    count = len(master)
    if count == 0:
        return
    _adamw[(triton.cdiv(count, BLOCK),)](
        master=master,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        grad=grad,
        scale=scale,
        weight=master if weight is None else weight,
        count=count,
        start=(first * 0x9E3779B1 + hyper.seed + hyper.step * 0x632BE5AB) & MASK,
        decay=1 - hyper.lr * hyper.weight_decay,
        rate=hyper.lr / (1 - hyper.beta1**hyper.step),
        beta1_rest=1 - hyper.beta1,
        beta2=hyper.beta2,
        beta2_rest=1 - hyper.beta2,
        eps=hyper.eps,
        corrected_square=1 - hyper.beta2**hyper.step,
        HAS_WEIGHT=weight is not None,
        ROUND=master.dtype == torch.bfloat16,
        BLOCK=BLOCK,
    )
