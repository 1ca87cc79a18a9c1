"""The routed experts (see dsv2/kernels/reference/experts.py) around torch's grouped product.

A pair's weight multiplies its hidden activations in the pass that computes them: W2 (w h) = w (W2 h).
The results of a token's pairs are then summed without weights. The gradient of a weight is computed together
with the activations' gradient. The activations kept for the backward pass are the pairs' rows, gate and up,
but not the experts' outputs.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dsv2.kernels.fused import swiglu
from dsv2.kernels.fused.rows import add_rows, copy_rows, pick, sort_slots
from dsv2.kernels.types import LateGradients, RowMap


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


class _LateGradients(torch.autograd.Function):
    """Computes the gradients of the weights with what the experts' backward pass has put into the box."""

    @staticmethod
    def forward(ctx, w13_E2FD, w2_EDF, box):
        ctx.box = box
        return w13_E2FD.new_empty(())

    @staticmethod
    def backward(ctx, handle):
        return *ctx.box.pop()(), None


def late_gradients(w13_E2FD: Tensor, w2_EDF: Tensor) -> LateGradients:
    box: list = []
    return LateGradients(_LateGradients.apply(w13_E2FD, w2_EDF, box), box)


def now_or_later(
    late: LateGradients | None, compute: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of w13, w2 and of the handle, or leave those of w13 and w2 to `late`."""
    if late is None:
        return *compute(), None
    late.box.append(compute)
    return None, None, torch.empty_like(late.handle)


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_XD, weights_XK, w13_E2FD, w2_EDF, handle, late, slots_P, places_XK, ends_E):
        pairs = RowMap(slots_P, places_XK)
        ctx.late = late
        ctx.done = False
        x_PD = copy_rows(x_XD, pairs)
        gate_up_P2F = _product(x_PD, w13_E2FD.transpose(1, 2), ends_E)
        weights_P = weights_XK.flatten()[slots_P]
        hidden_PF = swiglu.forward(*gate_up_P2F.chunk(2, dim=1), weights_P)
        y_PD = _product(hidden_PF, w2_EDF.transpose(1, 2), ends_E)
        kept = (x_PD, w13_E2FD, w2_EDF, slots_P, places_XK, ends_E, gate_up_P2F, weights_P)
        ctx.save_for_backward(*kept)
        return add_rows(y_PD, places_XK)

    @staticmethod
    def backward(ctx, grad_XD):
        x_PD, w13_E2FD, w2_EDF, slots_P, places_XK, ends_E, gate_up_P2F, weights_P = ctx.saved_tensors
        grad_y_PD = copy_rows(grad_XD.contiguous(), RowMap(slots_P, places_XK))
        hidden_PF = _product(grad_y_PD, w2_EDF, ends_E)  # first its gradient, then hidden in the same memory
        assert not ctx.done, "the experts' backward pass runs once: it overwrites what the forward pass kept"
        ctx.done = True
        grad_weights_P = swiglu.backward_in_place(hidden_PF, *gate_up_P2F.chunk(2, dim=1), weights_P)
        grad_gate_up = gate_up_P2F
        for_w2 = [grad_y_PD.t(), hidden_PF]
        del grad_y_PD, hidden_PF

        def weights() -> tuple[Tensor, Tensor]:
            grad_w2 = _product(*for_w2, ends_E)
            for_w2.clear()  # frees them before the next product
            return _product(grad_gate_up.t(), x_PD, ends_E), grad_w2

        grads_of_weights = now_or_later(ctx.late, weights)
        grad_x = add_rows(_product(grad_gate_up, w13_E2FD, ends_E), places_XK)
        return grad_x, pick(grad_weights_P, places_XK), *grads_of_weights, *[None] * 4


def routed_experts_by(
    function: type[torch.autograd.Function],
    x_XD: Tensor,
    expert_ids_XK: Tensor,
    weights_XK: Tensor,
    counts_E: Tensor,
    *,
    n_pairs: int,
    first_expert: int,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    late: LateGradients | None = None,
) -> Tensor:
    """Apply `function` to x, weights, w13, w2, `late`, the sorted pairs and each expert's end."""
    if n_pairs == 0:
        return _NoRows.apply(x_XD, weights_XK, w13_E2FD, w2_EDF)
    pairs, ends_E = sort_slots(expert_ids_XK.contiguous(), first_expert, len(counts_E), n_pairs)
    handle = None
    if late is not None:
        handle = late.handle
        w13_E2FD = w13_E2FD.detach()
        w2_EDF = w2_EDF.detach()
    tensors = (x_XD.contiguous(), weights_XK.contiguous(), w13_E2FD, w2_EDF, handle)
    return function.apply(*tensors, late, *pairs, ends_E)


routed_experts = partial(routed_experts_by, _RoutedExperts)
