"""The three balance losses against eqs. 23-31, one sequence at a time, in fp64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv2.kernels.reference.router import route
from dsv2.kernels.types import Choice
from dsv2.moe.balance import BalanceLosses
from tests.unit import reference
from tests.unit.helpers import balance_of, properties

N_GROUP, TOPK_GROUP, TOP_K, EXPERTS = 4, 2, 3, 12
LIMITS = (TOP_K, N_GROUP, TOPK_GROUP)


def routing_of(logits: np.ndarray, top_k: int, n_group: int, topk_group: int) -> Choice:
    """The paper's routing of tokens with these logits [T, E], in fp64."""
    s = np.array([reference.softmax(row) for row in logits])
    ids = [reference.select(list(row), top_k, n_group, topk_group) for row in s]
    ids_TK, affinity_TE = torch.tensor(ids), torch.from_numpy(s)
    return Choice(ids_TK, affinity_TE.gather(1, ids_TK), affinity_TE)


def random_routing(n_sequences: int, length: int, seed: int = 0) -> Choice:
    """Skewed, so that loads are unequal."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((n_sequences * length, EXPERTS)) + 0.5 * rng.standard_normal(EXPERTS)
    return routing_of(logits, *LIMITS)


def losses_of(routing: Choice, n_sequences: int) -> BalanceLosses:
    return balance_of(routing, n_sequences, N_GROUP, TOPK_GROUP)


@properties
@given(
    n_sequences=st.integers(1, 3),
    length=st.integers(1, 6),
    n_group=st.integers(1, 4),
    size=st.integers(1, 3),
    data=st.data(),
)
def test_against_the_equations(n_sequences, length, n_group, size, data):
    topk_group = data.draw(st.integers(1, n_group))
    top_k = data.draw(st.integers(1, topk_group * size))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    routing = routing_of(
        rng.standard_normal((n_sequences * length, n_group * size)), top_k, n_group, topk_group
    )
    losses = balance_of(routing, n_sequences, n_group, topk_group)
    per_sequence = [
        reference.balance(
            routing.affinity_TE[b * length : (b + 1) * length].numpy(),
            routing.expert_ids_TK[b * length : (b + 1) * length].tolist(),
            n_group,
            topk_group,
        )
        for b in range(n_sequences)
    ]
    # f is fp32: counts over T are rounded once or twice.
    np.testing.assert_allclose([float(x) for x in losses], np.mean(per_sequence, axis=0), rtol=1e-6)


def test_uniform_routing_gives_one():
    """Each expert is selected equally often and each token reaches exactly M groups."""
    groups = [(0, 1), (1, 2), (2, 3), (3, 0)]
    ids = torch.tensor([[2 * a + e, 2 * b + e] for a, b in groups for e in range(2)])
    affinity = torch.full((8, 8), 1 / 8)
    losses = balance_of(Choice(ids, affinity.gather(1, ids), affinity), 1, 4, 2)
    assert [float(x) for x in losses] == [1.0, 1.0, 1.0]


def test_collapsed_routing_gives_the_largest_losses():
    """All tokens and all affinity in one group: N_r / K experts, D devices, D / M of communication."""
    affinity = torch.zeros(5, 8)
    affinity[:, :2] = 0.5
    ids = torch.tensor([[0, 1]] * 5)
    losses = balance_of(Choice(ids, affinity.gather(1, ids), affinity), 1, 4, 2)
    assert [float(x) for x in losses] == [8 / 2, 4.0, 4 / 2]


def test_batch_is_the_mean_of_its_sequences():
    """Not the loss of one long sequence: f P is not linear in the sequence."""
    both = random_routing(2, 5)
    first, second = (losses_of(Choice(*(x[i * 5 : i * 5 + 5] for x in both)), 1) for i in range(2))
    one_long = losses_of(both, 1)
    for together, a, b, long in zip(losses_of(both, 2), first, second, one_long, strict=True):
        torch.testing.assert_close(together, (a + b) / 2)
        assert abs(float(together - long)) > 1e-3


def held_fixed(routing: Choice, n_sequences: int) -> list[np.ndarray]:
    """The factor of s_{i,t} in each loss: f over the tokens of all sequences, [3][T, E]."""
    length, size = len(routing.affinity_TE) // n_sequences, EXPERTS // N_GROUP
    factors = np.zeros((3, len(routing.affinity_TE), EXPERTS))
    for b in range(n_sequences):
        chosen = routing.expert_ids_TK[b * length : (b + 1) * length].tolist()
        f = [EXPERTS / (TOP_K * length) * sum(i in c for c in chosen) for i in range(EXPERTS)]
        for i in range(EXPERTS):
            d = i // size
            sent = sum(any(e // size == d for e in c) for c in chosen)
            f_device = sum(f[d * size : (d + 1) * size]) / size
            f_comm = N_GROUP / (TOPK_GROUP * length) * sent
            for t in range(b * length, (b + 1) * length):
                factors[:, t, i] = np.array([f[i], f_device, f_comm]) / (length * n_sequences)
    return list(factors)


def test_gradient_flows_through_p_only():
    """d L / d s_{i,t} = f_i / (T sequences): as if the counts were constants."""
    routing = random_routing(2, 5)
    affinity = routing.affinity_TE.clone().requires_grad_()
    losses = losses_of(routing._replace(affinity_TE=affinity), 2)
    for loss, factor in zip(losses, held_fixed(routing, 2), strict=True):
        (grad,) = torch.autograd.grad(loss, affinity, retain_graph=True)
        np.testing.assert_allclose(grad.numpy(), factor, rtol=1e-6)


@pytest.mark.parametrize("name", BalanceLosses._fields)
def test_gradient_by_finite_differences_of_p(name):
    """The selection is held fixed; the losses are linear in s, so any step is exact."""
    routing = random_routing(2, 4)
    affinity = routing.affinity_TE.clone().requires_grad_()
    getattr(losses_of(routing._replace(affinity_TE=affinity), 2), name).backward()
    direction = torch.from_numpy(np.random.default_rng(3).standard_normal(affinity.shape))
    moved = [
        getattr(losses_of(routing._replace(affinity_TE=routing.affinity_TE + h * direction), 2), name)
        for h in (0.5, -0.5)
    ]
    torch.testing.assert_close((affinity.grad * direction).sum(), moved[0] - moved[1])


@pytest.mark.parametrize("name", BalanceLosses._fields)
def test_gradient_reaches_the_router(name):
    """d L / d e_j = sum over t of u_t s_j (c_j - sum_i c_i s_i), with c the factor held fixed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, generator=generator) + 1
    centroids = torch.randn(EXPERTS, 6, generator=generator, requires_grad=True)
    routing = route(x, centroids, *LIMITS)
    getattr(losses_of(routing, 2), name).backward()
    detached = Choice(*(tensor.detach() for tensor in routing))
    c, s = held_fixed(detached, 2)[BalanceLosses._fields.index(name)], detached.affinity_TE.double().numpy()
    expected = np.zeros((EXPERTS, 6))
    for t in range(8):
        for j in range(EXPERTS):
            expected[j] += x[t].double().numpy() * s[t, j] * (c[t, j] - c[t] @ s[t])
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(centroids.grad.numpy(), expected, atol=2e-6)


def test_affinity_before_the_device_limit():
    """P counts a closed group's affinity too: here it is half of all, and no token is sent there."""
    affinity = torch.tensor([[0.4, 0.1, 0.3, 0.2]] * 3, dtype=torch.float64)
    ids = torch.tensor([[0, 1]] * 3)
    losses = balance_of(Choice(ids, affinity.gather(1, ids), affinity), 1, 2, 1)
    # f = 2, 2, 0, 0; f' = 2, 0; f'' = 2, 0
    np.testing.assert_allclose([float(x) for x in losses], [2 * 0.5] * 3)
