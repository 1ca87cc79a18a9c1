"""silu(gate) * up in one pass, and its backward in another.

Shapes: R rows, F width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _forward(
    gate,
    up,
    weight_R,
    out,
    gate_step,
    up_step,
    F: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + row * gate_step + f, mask=f < F, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_step + f, mask=f < F, other=0.0).to(tl.float32)
    value = g * tl.sigmoid(g) * u
    if HAS_WEIGHT:
        value *= tl.load(weight_R + row)
    tl.store(out + row * F + f, value.to(out.dtype.element_ty), mask=f < F)


@triton.jit
def _backward(
    grad,
    gate,
    up,
    weight_R,
    grad_gate,
    grad_up,
    grad_weight_R,
    value,
    gate_step,
    up_step,
    grad_step,
    F: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`value` gets the forward's result again; it may be `grad` itself."""
    row = tl.program_id(0).to(tl.int64)
    factor = 1.0
    if HAS_WEIGHT:
        factor = tl.load(weight_R + row)
    dot = 0.0
    for start in tl.static_range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        d = tl.load(grad + row * F + f, mask=f < F, other=0.0).to(tl.float32)
        g = tl.load(gate + row * gate_step + f, mask=f < F, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_step + f, mask=f < F, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        h = g * s * u
        if HAS_WEIGHT:
            dot += tl.sum(d * h, 0)
            tl.store(value + row * F + f, (h * factor).to(value.dtype.element_ty), mask=f < F)
        d *= factor
        to_gate, to_up = d * u * s * (1 + g * (1 - s)), d * g * s
        at = row * grad_step + f
        tl.store(grad_gate + at, to_gate.to(grad_gate.dtype.element_ty), mask=f < F)
        tl.store(grad_up + at, to_up.to(grad_up.dtype.element_ty), mask=f < F)
    if HAS_WEIGHT:
        tl.store(grad_weight_R + row, dot)


def forward(gate_RF: Tensor, up_RF: Tensor, weight_R: Tensor | None) -> Tensor:
    """[R, F]: silu(gate) * up, times each row's fp32 weight; no gradient. Rows may be strided."""
    rows, width = gate_RF.shape
    out = gate_RF.new_empty(rows, width)
    if out.numel():
        weight, steps = (out if weight_R is None else weight_R), (gate_RF.stride(0), up_RF.stride(0))
        grid = (rows, triton.cdiv(width, BLOCK))
        _forward[grid](gate_RF, up_RF, weight, out, *steps, width, weight_R is not None, BLOCK)
    return out


def backward_weighted(grad_RF: Tensor, gate_up_R2F: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of gate and up [R, 2F], of the weights [R]); `grad` is overwritten by the weighted result."""
    rows, width = grad_RF.shape
    grad_gate_up, grad_weight = torch.empty_like(gate_up_R2F), torch.empty_like(weight_R)
    if grad_RF.numel():
        gate, up = gate_up_R2F.split(width, dim=1)
        grad_gate, grad_up = grad_gate_up.split(width, dim=1)
        tensors = (grad_RF, gate, up, weight_R, grad_gate, grad_up, grad_weight, grad_RF)
        _backward[(rows,)](*tensors, 2 * width, 2 * width, 2 * width, width, True, BLOCK)
    return grad_gate_up, grad_weight


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        width = gate.shape[-1]
        return forward(gate.view(-1, width), up.view(-1, width), None).view_as(gate)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        grad, width = grad.contiguous(), gate.shape[-1]
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        if grad.numel():
            tensors = (grad, gate, up, grad, grad_gate, grad_up, grad, grad)
            _backward[(grad.numel() // width,)](*tensors, width, width, width, width, False, BLOCK)
        return grad_gate, grad_up


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return _SiluMul.apply(gate, up)
