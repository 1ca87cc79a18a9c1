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
    grad_weight_R,
    gate_step,
    up_step,
    F: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In place: the gradient becomes the forward's result, gate and up become their gradients."""
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
        tl.store(grad + row * F + f, (h * factor).to(grad.dtype.element_ty), mask=f < F)
        d *= factor
        to_gate, to_up = d * u * s * (1 + g * (1 - s)), d * g * s
        tl.store(gate + row * gate_step + f, to_gate.to(gate.dtype.element_ty), mask=f < F)
        tl.store(up + row * up_step + f, to_up.to(up.dtype.element_ty), mask=f < F)
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


def backward_in_place(
    grad_RF: Tensor, gate_RF: Tensor, up_RF: Tensor, weight_R: Tensor | None
) -> Tensor | None:
    """The gradients of gate and up take their places, the forward's result takes `grad`'s; returned is
    the gradient of the weights [R]. Rows of gate and up may be strided."""
    rows, width = grad_RF.shape
    grad_weight = None if weight_R is None else torch.empty_like(weight_R)
    if grad_RF.numel():
        weights = (grad_RF, grad_RF) if grad_weight is None else (weight_R, grad_weight)
        tensors = (grad_RF, gate_RF, up_RF, *weights)
        steps = (gate_RF.stride(0), up_RF.stride(0))
        _backward[(rows,)](*tensors, *steps, width, weight_R is not None, BLOCK)
    return grad_weight


class _SwiGLU(torch.autograd.Function):
    """Kept for backward: x, gate and up; their product is made again in the pass that needs them anyway."""

    @staticmethod
    def forward(ctx, x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
        x_TD = x.flatten(0, -2)
        gate_TF, up_TF = torch.mm(x_TD, gate_FD.t()), torch.mm(x_TD, up_FD.t())
        ctx.save_for_backward(x, gate_FD, up_FD, down_DF, gate_TF, up_TF)
        ctx.done = False
        return torch.mm(forward(gate_TF, up_TF, None), down_DF.t()).view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        assert not ctx.done, "a SwiGLU's backward runs once: it overwrites what forward kept"
        ctx.done = True
        x, gate_FD, up_FD, down_DF, gate_TF, up_TF = ctx.saved_tensors
        x_TD, grad_TD = x.flatten(0, -2), grad.flatten(0, -2)
        hidden_TF = torch.mm(grad_TD, down_DF)  # its gradient, then in its place itself
        backward_in_place(hidden_TF, gate_TF, up_TF, None)
        grads = [gate_TF, up_TF]
        grad_down = torch.mm(grad_TD.t(), hidden_TF)
        del hidden_TF
        grad_x = input_gradient(grads, [gate_FD, up_FD]).view(x.shape)
        return grad_x, *(torch.mm(grad.t(), x_TD) for grad in grads), grad_down


def swiglu(x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    return _SwiGLU.apply(x, gate_FD, up_FD, down_DF)
