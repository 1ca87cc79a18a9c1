"""The feed-forward networks, row by row, in fp64."""

import numpy as np
import pytest
import torch

from dsv2.moe.dispatch import Arrived
from dsv2.moe.experts import RoutedExperts, SwiGLU
from tests.unit import reference

HIDDEN, WIDTH = 5, 4


def random_(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.double().parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


def run(experts, x: torch.Tensor, ids: list[list[int]], weights: torch.Tensor, room: int = 0) -> torch.Tensor:
    """The stack applied to rows with these of its experts, counted from 0; -1 is absent.

    An absent expert is on a lower rank, or on a higher one. There is room for `room` more pairs.
    """
    ids_XK = torch.tensor(ids, dtype=torch.int64).view(weights.shape)
    counts = torch.tensor([int((ids_XK == e).sum()) for e in range(experts.n_local)])
    elsewhere = torch.tensor([-1, experts.first_expert + experts.n_local]).repeat(ids_XK.numel())
    ids_XK = (ids_XK + experts.first_expert).where(
        ids_XK >= 0, elsewhere[: ids_XK.numel()].view(ids_XK.shape)
    )
    return experts(Arrived(x, ids_XK, weights, counts, int(counts.sum()) + room))


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_swiglu():
    ffn, x = random_(SwiGLU(HIDDEN, WIDTH)), rows(6)
    matrices = [reference.weights_of(ffn)[f"{n}_proj.weight"] for n in ("gate", "up", "down")]
    expected = [reference.swiglu(row, *matrices) for row in x.numpy()]
    np.testing.assert_allclose(ffn(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "ids",
    [
        [[0, 1], [2, 1], [0, 2]],
        [[1, -1], [-1, 1], [2, 1], [-1, -1]],  # expert 0 gets nothing; -1 is absent
        [[-1], [-1]],
        [[0]] * 7,
        [],
    ],
)
@pytest.mark.parametrize("room", [False, True])
def test_routed_experts(ids, room):
    """Each row's weighted sum over its experts; the rows made room for beyond the pairs add nothing."""
    experts, x = random_(RoutedExperts(HIDDEN, WIDTH, n_experts=6, first_expert=3, n_local=3)), rows(len(ids))
    weights = torch.rand(len(ids), len(ids[0]) if ids else 2, dtype=torch.float64) + 0.5
    absent = sum(row.count(-1) for row in ids)
    out = run(experts, x, ids, weights, room=absent if room else 0)
    w = reference.weights_of(experts)
    expected = np.zeros((len(ids), HIDDEN))
    for r, k in np.ndindex(*weights.shape):
        if (e := ids[r][k]) >= 0:
            matrices = (*np.split(w["w13"][e], 2), w["w2"][e])
            expected[r] += float(weights[r, k]) * reference.swiglu(x[r].numpy(), *matrices)
    assert out.shape == x.shape
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ids", [[[0], [2], [2]], [[-1], [-1]], []])
def test_gradient_of_an_expert_without_rows_is_zero_not_missing(ids):
    experts = random_(RoutedExperts(HIDDEN, WIDTH, n_experts=3, first_expert=0, n_local=3))
    x = rows(len(ids)).requires_grad_()
    run(experts, x, ids, torch.ones(len(ids), 1, dtype=torch.float64)).sum().backward()
    for p in experts.parameters():
        nonzero = (p.grad != 0).flatten(1).any(dim=1)
        assert nonzero.tolist() == [[e] in ids for e in range(3)]


def test_gradients_by_finite_differences():
    experts, x = (
        random_(RoutedExperts(HIDDEN, WIDTH, n_experts=3, first_expert=0, n_local=3)),
        rows(3).requires_grad_(),
    )
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    w13, w2 = (p.detach().clone().requires_grad_() for p in (experts.w13, experts.w2))
    ids = torch.tensor([[0, 2], [2, -1], [2, 0]])  # none for expert 1, and one pair that is not here

    def forward(x, weights, w13, w2):
        arrived = Arrived(x, ids, weights, torch.tensor([2, 0, 3]), 6)
        return torch.func.functional_call(experts, {"w13": w13, "w2": w2}, (arrived,))

    assert torch.autograd.gradcheck(forward, (x, weights, w13, w2))
