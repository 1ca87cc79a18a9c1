"""RMSNorm in one pass with the residual sum before it; its backward pass adds the residual's gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels.reference import norm as reference

ADDED = 2048  # elements of one program of the sum
PROGRAMS = 1056  # of the backward pass: 8 per multiprocessor of a Hopper GPU; each sums a weight gradient


@triton.jit
def _forward(
    x,
    change,
    weight,
    total,
    out,
    inverse_rms,
    x_step,
    eps,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_step + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(change + row * WIDTH + d, mask=d < WIDTH, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * WIDTH + d, rounded, mask=d < WIDTH)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    tl.store(inverse_rms + row, scale)
    w = tl.load(weight + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + d, (value * scale * w).to(out.dtype.element_ty), mask=d < WIDTH)


@triton.jit
def _backward(
    grad,
    grad_total,
    x,
    weight,
    inverse_rms,
    grad_x,
    grad_weights,
    n_rows,
    x_step,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    d = tl.arange(0, BLOCK)
    w = tl.load(weight + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    to_weight = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, tl.cdiv(n_rows, tl.num_programs(0))):
        row = tl.program_id(0).to(tl.int64) + step * tl.num_programs(0)
        live = (d < WIDTH) & (row < n_rows)
        g = tl.load(grad + row * WIDTH + d, mask=live, other=0.0).to(tl.float32)
        scale = tl.load(inverse_rms + row, mask=row < n_rows, other=0.0)
        normed = tl.load(x + row * x_step + d, mask=live, other=0.0).to(tl.float32) * scale
        to_weight += g * normed
        g *= w
        to_x = (g - normed * (tl.sum(g * normed, 0) / WIDTH)) * scale
        if ADD:
            to_x += tl.load(grad_total + row * WIDTH + d, mask=live, other=0.0).to(tl.float32)
        tl.store(grad_x + row * WIDTH + d, to_x.to(grad_x.dtype.element_ty), mask=live)
    tl.store(grad_weights + tl.program_id(0) * WIDTH + d, to_weight, mask=d < WIDTH)


@triton.jit
def _add(a, b, c, out, count, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(a + n, mask=n < count).to(tl.float32) + tl.load(b + n, mask=n < count).to(tl.float32)
    total += tl.load(c + n, mask=n < count).to(tl.float32)
    tl.store(out + n, total.to(out.dtype.element_ty), mask=n < count)


def _warps(width: int) -> int:
    return min(16, max(1, triton.next_power_of_2(width) // 512))


def _norm(x: Tensor, change: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum (or x) as rows [rows, width], its norm, and 1 / rms [rows]. Rows may be strided."""
    width = x.shape[-1]
    rows = x.flatten(0, -2)
    assert rows.stride(1) == 1
    out = rows.new_empty(rows.shape)
    inverse_rms = rows.new_empty(len(rows), dtype=torch.float32)
    total = rows if change is None else torch.empty_like(out)
    _forward[(len(rows),)](
        x=rows,
        change=rows if change is None else change.contiguous(),
        weight=weight,
        total=total,
        out=out,
        inverse_rms=inverse_rms,
        x_step=rows.stride(0),
        eps=eps,
        WIDTH=width,
        ADD=change is not None,
        BLOCK=triton.next_power_of_2(width),
        num_warps=_warps(width),
    )
    return total, out, inverse_rms


def _norm_backward(
    grad: Tensor, grad_total: Tensor | None, rows: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, as rows, and that of the weight. The added term has the gradient of x."""
    n_rows, width = rows.shape
    grad_x = rows.new_empty(rows.shape)
    programs = min(n_rows, PROGRAMS)
    grad_weights = torch.empty(programs, width, dtype=torch.float32, device=rows.device)
    _backward[(programs,)](
        grad=grad.contiguous(),
        grad_total=(grad if grad_total is None else grad_total).contiguous(),
        x=rows,
        weight=weight,
        inverse_rms=inverse_rms,
        grad_x=grad_x,
        grad_weights=grad_weights,
        n_rows=n_rows,
        x_step=rows.stride(0),
        WIDTH=width,
        ADD=grad_total is not None,
        BLOCK=triton.next_power_of_2(width),
        num_warps=_warps(width),
    )
    return grad_x, grad_weights.sum(dim=0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, out, inverse_rms = _norm(x, None, weight, eps)
        ctx.save_for_backward(rows, weight, inverse_rms)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_weight = _norm_backward(grad, None, *ctx.saved_tensors)
        return grad_x.view(grad.shape), grad_weight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, change: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, out, inverse_rms = _norm(x, change, weight, eps)
        ctx.save_for_backward(total, weight, inverse_rms)
        ctx.changed = change is not None
        return total.view(x.shape), out.view(x.shape)

    @staticmethod
    def backward(ctx, grad_total: Tensor, grad: Tensor):
        grad_x, grad_weight = _norm_backward(grad, grad_total, *ctx.saved_tensors)
        grad_x = grad_x.view(grad.shape)
        return grad_x, (grad_x if ctx.changed else None), grad_weight, None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        a = a.contiguous()
        out = torch.empty_like(a)
        count = out.numel()
        if count:
            grid = (triton.cdiv(count, ADDED),)
            _add[grid](a=a, b=b.contiguous(), c=c.contiguous(), out=out, count=count, BLOCK=ADDED)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, grad, grad


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, change: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _AddRMSNorm.apply(x, change, weight, eps)


def add_up(x: Tensor, *terms: Tensor) -> Tensor:
    """Sum three tensors in one pass. torch sums two in one pass itself."""
    return _AddUp.apply(x, *terms) if len(terms) == 2 else reference.add_up(x, *terms)
