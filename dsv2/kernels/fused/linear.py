"""Matrices with a common input (dsv2/kernels/reference/linear.py): its gradients are summed in the products.

Shapes: T rows, D input width.
"""

import torch
from torch import Tensor


def input_gradient(grads: list[Tensor], weights: list[Tensor]) -> Tensor:
    """[T, D]: the sum over the matrices of grad [T, width] times weight [width, D]."""
    total_TD = torch.mm(grads[0], weights[0])
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        total_TD.addmm_(grad, weight)
    return total_TD


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor):
        ctx.save_for_backward(x, *weights)
        x_TD = x.flatten(0, -2)
        return tuple(torch.mm(x_TD, weight.t()).unflatten(0, x.shape[:-1]) for weight in weights)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, *weights = ctx.saved_tensors
        x_TD, rows = x.flatten(0, -2), [grad.flatten(0, -2) for grad in grads]
        return input_gradient(rows, weights).view(x.shape), *(torch.mm(grad.t(), x_TD) for grad in rows)


def linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return _Linears.apply(x, *weights)
