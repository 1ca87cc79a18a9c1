"""Products of several matrices with one input. The backward products sum the input's gradient themselves."""

import torch
from torch import Tensor


def input_gradient(grads: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Return the sum over the matrices of grad [rows, width] times weight [width, input width]."""
    total = torch.mm(grads[0], weights[0])
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        total.addmm_(grad, weight)
    return total


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor):
        ctx.save_for_backward(x, *weights)
        rows = x.flatten(0, -2)
        return tuple(torch.mm(rows, weight.t()).unflatten(0, x.shape[:-1]) for weight in weights)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, *weights = ctx.saved_tensors
        rows = x.flatten(0, -2)
        row_grads = [grad.flatten(0, -2) for grad in grads]
        grad_x = input_gradient(row_grads, weights).view(x.shape)
        return grad_x, *(torch.mm(grad.t(), rows) for grad in row_grads)


def linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return _Linears.apply(x, *weights)
