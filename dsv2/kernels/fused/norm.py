"""RMSNorm with the residual sum before it in one pass; backward with the residual's gradient in another.

Shapes: R rows, D width, P programs of the backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels.reference import norm as reference

ADDED = 2048  # elements of one program of the sum
PROGRAMS = 1056  # of the backward, 8 for each of a Hopper's multiprocessors; each adds up a weight gradient


@triton.jit
def _forward(
    x,
    change,
    weight,
    total,
    out,
    scale_R,
    x_step,
    eps,
    D: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_step + d, mask=d < D, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(change + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * D + d, rounded, mask=d < D)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    tl.store(scale_R + row, scale)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + row * D + d, (value * scale * w).to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _backward(
    grad,
    grad_total,
    x,
    weight,
    scale_R,
    grad_x,
    grad_weight_PD,
    R,
    x_step,
    D: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    d = tl.arange(0, BLOCK)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    to_weight = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, tl.cdiv(R, tl.num_programs(0))):
        row = tl.program_id(0).to(tl.int64) + step * tl.num_programs(0)
        live = (d < D) & (row < R)
        g = tl.load(grad + row * D + d, mask=live, other=0.0).to(tl.float32)
        scale = tl.load(scale_R + row, mask=row < R, other=0.0)
        normed = tl.load(x + row * x_step + d, mask=live, other=0.0).to(tl.float32) * scale
        to_weight += g * normed
        g *= w
        to_x = (g - normed * (tl.sum(g * normed, 0) / D)) * scale
        if ADD:
            to_x += tl.load(grad_total + row * D + d, mask=live, other=0.0).to(tl.float32)
        tl.store(grad_x + row * D + d, to_x.to(grad_x.dtype.element_ty), mask=live)
    tl.store(grad_weight_PD + tl.program_id(0) * D + d, to_weight, mask=d < D)


@triton.jit
def _add(a, b, c, out, N, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(a + n, mask=n < N).to(tl.float32) + tl.load(b + n, mask=n < N).to(tl.float32)
    total += tl.load(c + n, mask=n < N).to(tl.float32)
    tl.store(out + n, total.to(out.dtype.element_ty), mask=n < N)


def _warps(width: int) -> int:
    return min(16, max(1, triton.next_power_of_2(width) // 512))


def _norm(x: Tensor, change: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(the sum, or x, as rows [R, D]; its norm; 1 / rms [R]). The rows of x may be strided."""
    width = x.shape[-1]
    x_RD = x.flatten(0, -2)
    assert x_RD.stride(1) == 1
    out_RD = x_RD.new_empty(x_RD.shape)
    scale_R = x_RD.new_empty(len(x_RD), dtype=torch.float32)
    total_RD = x_RD if change is None else torch.empty_like(out_RD)
    change_RD = x_RD if change is None else change.contiguous()
    tensors = (x_RD, change_RD, weight, total_RD, out_RD, scale_R)
    sizes = (x_RD.stride(0), eps, width, change is not None, triton.next_power_of_2(width))
    _forward[(len(x_RD),)](*tensors, *sizes, num_warps=_warps(width))
    return total_RD, out_RD, scale_R


def _norm_backward(
    grad: Tensor, grad_total: Tensor | None, x_RD: Tensor, weight: Tensor, scale_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x (and of what was added to it) as rows, and of the weight."""
    rows, width = x_RD.shape
    grad_x = x_RD.new_empty(x_RD.shape)
    programs = min(rows, PROGRAMS)
    grad_weight_PD = torch.empty(programs, width, dtype=torch.float32, device=x_RD.device)
    with_total = grad if grad_total is None else grad_total
    tensors = (grad.contiguous(), with_total.contiguous(), x_RD, weight, scale_R, grad_x, grad_weight_PD)
    sizes = (rows, x_RD.stride(0), width, grad_total is not None, triton.next_power_of_2(width))
    _backward[(programs,)](*tensors, *sizes, num_warps=_warps(width))
    return grad_x, grad_weight_PD.sum(dim=0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_RD, out_RD, scale_R = _norm(x, None, weight, eps)
        ctx.save_for_backward(x_RD, weight, scale_R)
        return out_RD.view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_weight = _norm_backward(grad, None, *ctx.saved_tensors)
        return grad_x.view(grad.shape), grad_weight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, change: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total_RD, out_RD, scale_R = _norm(x, change, weight, eps)
        ctx.save_for_backward(total_RD, weight, scale_R)
        ctx.changed = change is not None
        return total_RD.view(x.shape), out_RD.view(x.shape)

    @staticmethod
    def backward(ctx, grad_total: Tensor, grad: Tensor):
        grad_x, grad_weight = _norm_backward(grad, grad_total, *ctx.saved_tensors)
        grad_x = grad_x.view(grad.shape)
        return grad_x, (grad_x if ctx.changed else None), grad_weight, None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        a, b, c = a.contiguous(), b.contiguous(), c.contiguous()
        out = torch.empty_like(a)
        if out.numel():
            _add[(triton.cdiv(out.numel(), ADDED),)](a, b, c, out, out.numel(), ADDED)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, grad, grad


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, change: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _AddRMSNorm.apply(x, change, weight, eps)


def add_up(x: Tensor, *others: Tensor) -> Tensor:
    """Three in one pass; torch adds two as well."""
    return _AddUp.apply(x, *others) if len(others) == 2 else reference.add_up(x, *others)
