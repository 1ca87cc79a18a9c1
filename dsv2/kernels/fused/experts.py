"""The routed experts (see dsv2/kernels/reference/experts.py) around torch's grouped product.

A pair's weight multiplies its hidden activations, in the pass that makes them: W2 (w h) = w (W2 h). So
the way back to the tokens is a plain sum, and the gradient of a weight is found where the activations
are at hand; the experts' outputs are never kept. Kept for backward: the pairs' rows, and gate and up.

Shapes: R rows, K slots a row, P pairs of a row and an expert, D hidden_size, E experts, F their width.
"""

from functools import partial

import torch
from torch import Tensor

from dsv2.kernels.fused import swiglu
from dsv2.kernels.fused.rows import add_rows, copy_rows, sort_slots
from dsv2.kernels.reference.rows import RowMap


def _product(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """Rows' products with their group's matrix; or, of two transposed row sets, one matrix a group."""
    return torch._grouped_mm(a, b, offs=ends_E)


class _NoRows(torch.autograd.Function):
    """No token has chosen any expert here: gradients are zeros, not missing, as all ranks reduce the same."""

    @staticmethod
    def forward(ctx, x_RD, weights_RK, w13_E2FD, w2_EDF):
        ctx.save_for_backward(x_RD, weights_RK, w13_E2FD, w2_EDF)
        return x_RD.new_zeros(x_RD.shape)

    @staticmethod
    def backward(ctx, grad_RD):
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, weights_RK, w13_E2FD, w2_EDF, pairs: RowMap, place_RK, ends_E):
        ctx.pairs, ctx.done = pairs, False
        x_PD = copy_rows(x_RD, pairs)
        gate_up_P2F = _product(x_PD, w13_E2FD.transpose(1, 2), ends_E)
        weight_P = weights_RK.flatten()[pairs.slot_P]
        hidden_PF = swiglu.forward(*gate_up_P2F.chunk(2, dim=1), weight_P)
        y_PD = _product(hidden_PF, w2_EDF.transpose(1, 2), ends_E)
        ctx.save_for_backward(x_PD, w13_E2FD, w2_EDF, place_RK, ends_E, gate_up_P2F, weight_P)
        return add_rows(y_PD, place_RK)

    @staticmethod
    def backward(ctx, grad_RD):
        x_PD, w13_E2FD, w2_EDF, place_RK, ends_E, gate_up_P2F, weight_P = ctx.saved_tensors
        pairs = ctx.pairs
        grad_y_PD = copy_rows(grad_RD.contiguous(), pairs)
        hidden_PF = _product(grad_y_PD, w2_EDF, ends_E)  # its gradient, then in its place itself
        assert not ctx.done, "the experts' backward runs once: it overwrites what forward kept"
        ctx.done = True
        grad_weight_P = swiglu.backward_in_place(hidden_PF, *gate_up_P2F.chunk(2, dim=1), weight_P)
        grad_gate_up = gate_up_P2F
        grad_w2 = _product(grad_y_PD.t(), hidden_PF, ends_E)
        del grad_y_PD, hidden_PF
        grad_w13 = _product(grad_gate_up.t(), x_PD, ends_E)
        grad_x = add_rows(_product(grad_gate_up, w13_E2FD, ends_E), place_RK)
        grad_weights = weights_gradient(grad_weight_P, pairs, place_RK)
        return grad_x, grad_weights, grad_w13, grad_w2, *[None] * 3


def weights_gradient(grad_weight_P: Tensor, pairs: RowMap, place_RK: Tensor) -> Tensor:
    """[R, K]. Rows beyond the last expert's are dropped pairs: whatever stands there counts for nothing."""
    grad_N = grad_weight_P.new_zeros(place_RK.numel()).index_copy_(0, pairs.slot_P, grad_weight_P)
    return grad_N.view_as(place_RK).where(place_RK >= 0, 0.0)


def routed_experts_by(
    function: type[torch.autograd.Function],
    x_RD: Tensor,
    expert_ids_RK: Tensor,
    weights_RK: Tensor,
    counts_E: Tensor,
    n_pairs: int,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
) -> Tensor:
    """`function` of x, weights, w13, w2, the pairs sorted by expert, each slot's place, each expert's end."""
    if n_pairs == 0:
        return _NoRows.apply(x_RD, weights_RK, w13_E2FD, w2_EDF)
    key_RK = expert_ids_RK.to(torch.int16)
    pairs, place_RK, ends_E = sort_slots(key_RK.where(key_RK >= 0, len(counts_E)), len(counts_E), n_pairs)
    return function.apply(
        x_RD.contiguous(), weights_RK.contiguous(), w13_E2FD, w2_EDF, pairs, place_RK, ends_E
    )


routed_experts = partial(routed_experts_by, _RoutedExperts)
