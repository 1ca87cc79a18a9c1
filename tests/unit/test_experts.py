"""The feed-forward networks, row by row, in fp64."""

import numpy as np
import pytest
import torch

from dsv2.moe.experts import RoutedExperts, SwiGLU
from tests.unit import reference

HIDDEN, WIDTH = 5, 4


def random_(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.double().parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_swiglu():
    ffn, x = random_(SwiGLU(HIDDEN, WIDTH)), rows(6)
    matrices = [reference.weights_of(ffn)[f"{n}_proj.weight"] for n in ("gate", "up", "down")]
    expected = [reference.swiglu(row, *matrices) for row in x.numpy()]
    np.testing.assert_allclose(ffn(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counts", [[3, 2, 4], [0, 5, 1], [2, 0, 0], [0, 0, 0], [0, 0, 7]])
def test_routed_experts(counts):
    experts, x = random_(RoutedExperts(HIDDEN, WIDTH, 6, 3, 3)), rows(sum(counts))
    out = experts(x, counts)
    w = reference.weights_of(experts)
    owner = [e for e, n in enumerate(counts) for _ in range(n)]
    expected = [
        reference.swiglu(row, *np.split(w["w13"][e], 2), w["w2"][e])
        for row, e in zip(x.numpy(), owner, strict=True)
    ]
    assert out.shape == x.shape
    np.testing.assert_allclose(out.detach().numpy(), np.reshape(expected, x.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0]])
def test_gradient_of_an_expert_without_rows_is_zero_not_missing(counts):
    experts = random_(RoutedExperts(HIDDEN, WIDTH, 3, 0, 3))
    x = rows(sum(counts)).requires_grad_()
    experts(x, counts).sum().backward()
    for p in experts.parameters():
        nonzero = (p.grad != 0).flatten(1).any(dim=1)
        assert nonzero.tolist() == [n > 0 for n in counts]


def test_gradients_by_finite_differences():
    experts, x = random_(RoutedExperts(HIDDEN, WIDTH, 3, 0, 3)), rows(5).requires_grad_()
    w13, w2 = (p.detach().clone().requires_grad_() for p in (experts.w13, experts.w2))

    def forward(x, w13, w2):
        return torch.func.functional_call(experts, {"w13": w13, "w2": w2}, (x, [2, 0, 3]))

    assert torch.autograd.gradcheck(forward, (x, w13, w2))
