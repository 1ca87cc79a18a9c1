"""SwiGLU between its products: silu(gate) * up in one pass, and its backward pass in another."""

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
    weight,
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
        value *= tl.load(weight + row)
    tl.store(out + row * F + f, value.to(out.dtype.element_ty), mask=f < F)


@triton.jit
def _backward(
    grad,
    gate,
    up,
    weight,
    grad_weight,
    gate_step,
    up_step,
    F: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite the gradient with the forward pass's result, and gate and up with their gradients."""
    row = tl.program_id(0).to(tl.int64)
    factor = 1.0
    if HAS_WEIGHT:
        factor = tl.load(weight + row)
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
        to_gate = d * u * s * (1 + g * (1 - s))
        to_up = d * g * s
        tl.store(gate + row * gate_step + f, to_gate.to(gate.dtype.element_ty), mask=f < F)
        tl.store(up + row * up_step + f, to_up.to(up.dtype.element_ty), mask=f < F)
    if HAS_WEIGHT:
        tl.store(grad_weight + row, dot)


def forward(gate: Tensor, up: Tensor, weight: Tensor | None) -> Tensor:
    """Return silu(gate) * up [rows, F], times each row's fp32 weight; no gradient. Rows may be strided."""
    rows, width = gate.shape
    out = gate.new_empty(rows, width)
    if out.numel():
        _forward[(rows, triton.cdiv(width, BLOCK))](
            gate=gate,
            up=up,
            weight=out if weight is None else weight,
            out=out,
            gate_step=gate.stride(0),
            up_step=up.stride(0),
            F=width,
            HAS_WEIGHT=weight is not None,
            BLOCK=BLOCK,
        )
    return out


def backward_in_place(grad: Tensor, gate: Tensor, up: Tensor, weight: Tensor | None) -> Tensor | None:
    """Overwrite gate and up [rows, F] with their gradients, and `grad` with the forward pass's result.

    Rows of gate and up may be strided.

    Returns:
        The gradient of the weights [rows]; None without weights.
    """
    rows, width = grad.shape
    grad_weight = None if weight is None else torch.empty_like(weight)
    if grad.numel():
        _backward[(rows,)](
            grad=grad,
            gate=gate,
            up=up,
            weight=grad if weight is None else weight,
            grad_weight=grad if grad_weight is None else grad_weight,
            gate_step=gate.stride(0),
            up_step=up.stride(0),
            F=width,
            HAS_WEIGHT=weight is not None,
            BLOCK=BLOCK,
        )
    return grad_weight


class _SwiGLU(torch.autograd.Function):
    """Keeps x, gate and up. The backward pass reads gate and up anyway, and recomputes their product."""

    @staticmethod
    def forward(ctx, x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
        x_TD = x.flatten(0, -2)
        gate_TF = torch.mm(x_TD, gate_FD.t())
        up_TF = torch.mm(x_TD, up_FD.t())
        kept = (x, gate_FD, up_FD, down_DF, gate_TF, up_TF)
        ctx.save_for_backward(*kept)
        ctx.done = False
        return torch.mm(forward(gate_TF, up_TF, None), down_DF.t()).view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        assert not ctx.done, "a SwiGLU's backward pass runs once: it overwrites what the forward pass kept"
        ctx.done = True
        x, gate_FD, up_FD, down_DF, gate_TF, up_TF = ctx.saved_tensors
        x_TD = x.flatten(0, -2)
        grad_TD = grad.flatten(0, -2)
        hidden_TF = torch.mm(grad_TD, down_DF)  # first its gradient, then hidden in the same memory
        backward_in_place(hidden_TF, gate_TF, up_TF, None)
        grads = [gate_TF, up_TF]
        grad_down = torch.mm(grad_TD.t(), hidden_TF)
        del hidden_TF
        grad_x = input_gradient(grads, [gate_FD, up_FD]).view(x.shape)
        return grad_x, *(torch.mm(grad.t(), x_TD) for grad in grads), grad_down


def swiglu(x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    return _SwiGLU.apply(x, gate_FD, up_FD, down_DF)
