"""The routed experts (see dsv2/kernels/reference/experts.py) around torch's grouped product.

A pair's weight multiplies its hidden activations in the pass that computes them: W2 (w h) = w (W2 h).
The results of a token's pairs are then summed without weights. The gradient of a weight is computed together
with the activations' gradient. The activations kept for the backward pass are the pairs' rows, gate and up,
but not the experts' outputs.
"""

from functools import partial

import torch
from torch import Tensor

from dsv2.kernels.fused import swiglu
from dsv2.kernels.fused.rows import add_rows, copy_rows, sort_slots
from dsv2.kernels.types import RowMap


def _product(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply rows by their group's matrix. With two transposed row sets, return one matrix per group."""
    return torch._grouped_mm(a, b, offs=ends_E)


class _NoRows(torch.autograd.Function):
    """Return zeros when no token chose an expert of this rank.

    The gradients are zero, not missing, because all ranks must reduce the same tensors.
    """

    @staticmethod
    def forward(ctx, x_XD, weights_XK, w13_E2FD, w2_EDF):
        ctx.save_for_backward(x_XD, weights_XK, w13_E2FD, w2_EDF)
        return x_XD.new_zeros(x_XD.shape)

    @staticmethod
    def backward(ctx, grad_XD):
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_XD, weights_XK, w13_E2FD, w2_EDF, pairs: RowMap, places_XK, ends_E):
        ctx.pairs = pairs
        ctx.done = False
        x_PD = copy_rows(x_XD, pairs)
        gate_up_P2F = _product(x_PD, w13_E2FD.transpose(1, 2), ends_E)
        weights_P = weights_XK.flatten()[pairs.slots]
        hidden_PF = swiglu.forward(*gate_up_P2F.chunk(2, dim=1), weights_P)
        y_PD = _product(hidden_PF, w2_EDF.transpose(1, 2), ends_E)
        kept = (x_PD, w13_E2FD, w2_EDF, places_XK, ends_E, gate_up_P2F, weights_P)
        ctx.save_for_backward(*kept)
        return add_rows(y_PD, places_XK)

    @staticmethod
    def backward(ctx, grad_XD):
        x_PD, w13_E2FD, w2_EDF, places_XK, ends_E, gate_up_P2F, weights_P = ctx.saved_tensors
        pairs = ctx.pairs
        grad_y_PD = copy_rows(grad_XD.contiguous(), pairs)
        hidden_PF = _product(grad_y_PD, w2_EDF, ends_E)  # first its gradient, then hidden in the same memory
        assert not ctx.done, "the experts' backward pass runs once: it overwrites what the forward pass kept"
        ctx.done = True
        grad_weights_P = swiglu.backward_in_place(hidden_PF, *gate_up_P2F.chunk(2, dim=1), weights_P)
        grad_gate_up = gate_up_P2F
        grad_w2 = _product(grad_y_PD.t(), hidden_PF, ends_E)
        del grad_y_PD, hidden_PF
        grad_w13 = _product(grad_gate_up.t(), x_PD, ends_E)
        grad_x = add_rows(_product(grad_gate_up, w13_E2FD, ends_E), places_XK)
        grad_weights = weights_gradient(grad_weights_P, pairs, places_XK)
        return grad_x, grad_weights, grad_w13, grad_w2, *[None] * 3


def weights_gradient(grad_weights_P: Tensor, pairs: RowMap, places_XK: Tensor) -> Tensor:
    """Return the weights' gradient [X, K], with zeros for dropped pairs: the rows after the last expert's."""
    grads = grad_weights_P.new_zeros(places_XK.numel()).index_copy_(0, pairs.slots, grad_weights_P)
    return grads.view_as(places_XK).where(places_XK >= 0, 0.0)


def routed_experts_by(
    function: type[torch.autograd.Function],
    x_XD: Tensor,
    expert_ids_XK: Tensor,
    weights_XK: Tensor,
    counts_E: Tensor,
    *,
    n_pairs: int,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
) -> Tensor:
    """Apply `function` to x, weights, w13, w2, the sorted pairs, each slot's row and each expert's end."""
    if n_pairs == 0:
        return _NoRows.apply(x_XD, weights_XK, w13_E2FD, w2_EDF)
    keys_XK = expert_ids_XK.to(torch.int16)
    keys_XK = keys_XK.where(keys_XK >= 0, len(counts_E))
    sorted_slots = sort_slots(keys_XK, len(counts_E), n_pairs)
    return function.apply(x_XD.contiguous(), weights_XK.contiguous(), w13_E2FD, w2_EDF, *sorted_slots)


routed_experts = partial(routed_experts_by, _RoutedExperts)
