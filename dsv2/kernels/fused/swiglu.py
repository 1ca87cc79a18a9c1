"""SwiGLU: silu(gate) * up in one pass, and its backward in another, between the products.

Shapes: R rows, F width; of the network: T tokens, D hidden_size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels.fused.linear import input_gradient

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


def backward(
    grad_RF: Tensor, gate_RF: Tensor, up_RF: Tensor, weight_R: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(gradient of gate and up side by side [R, 2F], of the weights [R]); `grad` is overwritten by the
    forward's result. Rows of gate and up may be strided."""
    rows, width = grad_RF.shape
    grad_gate_up = grad_RF.new_empty(rows, 2 * width)
    grad_weight = None if weight_R is None else torch.empty_like(weight_R)
    if grad_RF.numel():
        grad_gate, grad_up = grad_gate_up.split(width, dim=1)
        weights = (grad_RF, grad_RF) if grad_weight is None else (weight_R, grad_weight)
        tensors = (grad_RF, gate_RF, up_RF, weights[0], grad_gate, grad_up, weights[1], grad_RF)
        steps = (gate_RF.stride(0), up_RF.stride(0), 2 * width)
        _backward[(rows,)](*tensors, *steps, width, weight_R is not None, BLOCK)
    return grad_gate_up, grad_weight


class _SwiGLU(torch.autograd.Function):
    """Kept for backward: x, gate and up; their product is made again in the pass that needs them anyway."""

    @staticmethod
    def forward(ctx, x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
        x_TD = x.flatten(0, -2)
        gate_TF, up_TF = torch.mm(x_TD, gate_FD.t()), torch.mm(x_TD, up_FD.t())
        ctx.save_for_backward(x, gate_FD, up_FD, down_DF, gate_TF, up_TF)
        return torch.mm(forward(gate_TF, up_TF, None), down_DF.t()).view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, gate_FD, up_FD, down_DF, gate_TF, up_TF = ctx.saved_tensors
        x_TD, grad_TD = x.flatten(0, -2), grad.flatten(0, -2)
        hidden_TF = torch.mm(grad_TD, down_DF)  # its gradient, then in its place itself
        grad_gate_up, _ = backward(hidden_TF, gate_TF, up_TF, None)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=1)
        grad_down = torch.mm(grad_TD.t(), hidden_TF)
        del hidden_TF
        grad_x = input_gradient([grad_gate, grad_up], [gate_FD, up_FD]).view(x.shape)
        return grad_x, torch.mm(grad_gate.t(), x_TD), torch.mm(grad_up.t(), x_TD), grad_down


def swiglu(x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    return _SwiGLU.apply(x, gate_FD, up_FD, down_DF)
