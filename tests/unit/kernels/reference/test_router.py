"""Device-limited routing against eqs. 21-22 and section 2.2.2, one token at a time."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv2.kernels.reference.router import route, sequence_sums
from dsv2.kernels.types import Choice
from tests.unit import reference
from tests.unit.helpers import properties


class Shape(NamedTuple):
    tokens: int
    n_group: int
    size: int  # experts a group
    topk_group: int
    top_k: int

    @property
    def experts(self) -> int:
        return self.n_group * self.size


@st.composite
def shapes(draw) -> Shape:
    n_group, size = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    topk_group = draw(st.integers(1, n_group))
    top_k = draw(st.integers(1, topk_group * size))
    return Shape(draw(st.integers(1, 12)), n_group, size, topk_group, top_k)


def route_affinities(rows: list[list[float]], top_k: int, n_group: int, topk_group: int):
    """Choice of tokens with (nearly) these affinities: the logits are their logarithms."""
    affinity = torch.tensor(rows)
    return route(affinity.log(), torch.eye(affinity.shape[1]), top_k, n_group, topk_group)


@properties
@given(shape=shapes(), seed=st.integers(0, 10_000))
def test_against_the_equations(shape, seed):
    x, centroids = torch.randn(
        shape.tokens + shape.experts, 6, generator=torch.Generator().manual_seed(seed)
    ).split([shape.tokens, shape.experts])
    routing = route(x, centroids, shape.top_k, shape.n_group, shape.topk_group)
    for t in range(shape.tokens):
        s = reference.affinities(x[t].double().numpy(), centroids.double().numpy())
        # fp32: the logits, around 6 here, carry 1e-6 at most.
        np.testing.assert_allclose(routing.affinity_TE[t].numpy(), s, rtol=1e-5)
        # From the fp32 affinities, so that rounding cannot decide a near tie another way.
        row = routing.affinity_TE[t].tolist()
        chosen = reference.select(row, shape.top_k, shape.n_group, shape.topk_group)
        assert routing.expert_ids_TK[t].tolist() == chosen
        assert routing.affinity_TK[t].tolist() == [row[i] for i in chosen], "not renormalised"


@properties
@given(shape=shapes(), seed=st.integers(0, 10_000))
def test_ties_go_to_the_lower_index(shape, seed):
    """Logits of a few values: most scores and groups are tied."""
    logits = np.random.default_rng(seed).integers(0, 3, (shape.tokens, shape.experts)).astype(np.float32)
    limits = (shape.top_k, shape.n_group, shape.topk_group)
    routing = route(torch.from_numpy(logits), torch.eye(shape.experts), *limits)
    for t in range(shape.tokens):
        assert routing.expert_ids_TK[t].tolist() == reference.select(logits[t].tolist(), *limits)


def test_ties_among_as_many_experts_as_v2_has():
    """Unstable sorts tend to be stable for a handful of numbers."""
    logits = np.random.default_rng(0).integers(0, 3, (20, 160)).astype(np.float32)
    routing = route(torch.from_numpy(logits), torch.eye(160), 6, 8, 3)
    for t in range(20):
        assert routing.expert_ids_TK[t].tolist() == reference.select(logits[t].tolist(), 6, 8, 3)


def test_all_tied():
    routing = route(torch.zeros(1, 4), torch.randn(8, 4), 3, 4, 2)
    assert routing.expert_ids_TK.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(routing.affinity_TE, torch.full((1, 8), 1 / 8))


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        # Sums and sums of the top 2 (V3's rule) would open group 1 or 2.
        ([0.30, 0.01, 0.01, 0.20, 0.19, 0.02, 0.09, 0.09, 0.09], [0, 1]),
        ([0.10, 0.10, 0.10, 0.16, 0.15, 0.01, 0.17, 0.01, 0.20], [8, 6]),
    ],
)
def test_group_score_is_the_maximum(rows, chosen):
    routing = route_affinities([rows], top_k=2, n_group=3, topk_group=1)
    assert routing.expert_ids_TK.tolist() == [chosen]


def test_second_group_by_its_maximum_too():
    rows = [[0.40, 0.01, 0.14, 0.13, 0.20, 0.02, 0.05, 0.05]]
    routing = route_affinities(rows, top_k=3, n_group=4, topk_group=2)
    assert routing.expert_ids_TK.tolist() == [[0, 4, 5]], (
        "2 and 3 are better than 5 but their group is closed"
    )


def test_closed_expert_loses_to_one_that_underflowed():
    """Affinities of the open group's other experts are 0 in fp32, like everything else."""
    logits = torch.full((1, 6), -300.0)
    logits[0, 3] = 0.0
    routing = route(logits, torch.eye(6), 3, 2, 1)
    assert routing.affinity_TE[0, 4] == 0
    assert routing.expert_ids_TK.tolist() == [[3, 4, 5]]


@pytest.mark.parametrize("n_group", [1, 4])
def test_without_a_limit_it_is_plain_top_k(n_group):
    generator = torch.Generator().manual_seed(0)
    x, centroids = torch.randn(50, 8, generator=generator), torch.randn(16, 8, generator=generator)
    routing = route(x, centroids, 5, n_group, n_group)
    top = (x @ centroids.T).softmax(dim=-1).topk(5)
    assert torch.equal(routing.expert_ids_TK, top.indices)


def test_weights_are_not_renormalised():
    """norm_topk_prob = false: the softmax is over all experts, the selected ones add up to less."""
    routing = route_affinities([[0.4, 0.3, 0.2, 0.1]], top_k=2, n_group=2, topk_group=2)
    torch.testing.assert_close(routing.affinity_TK, torch.tensor([[0.4, 0.3]]))
    closed = route_affinities([[0.4, 0.1, 0.3, 0.2]], top_k=2, n_group=2, topk_group=1)
    torch.testing.assert_close(closed.affinity_TK, torch.tensor([[0.4, 0.1]]))
    torch.testing.assert_close(closed.affinity_TE, torch.tensor([[0.4, 0.1, 0.3, 0.2]]))


def test_affinities_are_fp32_under_bf16():
    """bf16 logits would be off by up to 2 %, a bf16 softmax by 0.4 %."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(40, 32, generator=generator)).bfloat16()
    centroids = torch.randn(16, 32, generator=generator).bfloat16()
    routing = route(x, centroids, 4, 4, 2)
    assert routing.affinity_TE.dtype == routing.affinity_TK.dtype == torch.float32
    exact = (x.double() @ centroids.double().T).softmax(dim=-1)
    torch.testing.assert_close(routing.affinity_TE.double(), exact, rtol=2e-5, atol=0)


def test_gradient_flows_through_the_selected_affinities():
    """d s_i / d logit_j = s_i (1(i = j) - s_j), for all experts j, closed ones too."""
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    routing = route(logits, torch.eye(6), 2, 3, 1)
    readout = torch.tensor([[1.0, -2.0], [0.5, 3.0], [2.0, 0.0]])
    (routing.affinity_TK * readout).sum().backward()
    s = routing.affinity_TE.detach()
    expected = torch.zeros(3, 6)
    for t in range(3):
        for k in range(2):
            i = int(routing.expert_ids_TK[t, k])
            for j in range(6):
                expected[t, j] += readout[t, k] * s[t, i] * (float(i == j) - s[t, j])
    torch.testing.assert_close(logits.grad, expected)


@properties
@given(shape=shapes(), n_sequences=st.integers(1, 3), seed=st.integers(0, 10_000))
def test_sums_over_each_sequence(shape, n_sequences, seed):
    rng, tokens = np.random.default_rng(seed), n_sequences * shape.tokens
    s = rng.dirichlet(np.ones(shape.experts), size=tokens)
    ids = np.stack([rng.permutation(shape.experts)[: shape.top_k] for _ in range(tokens)])
    affinity, ids_TK = torch.from_numpy(s), torch.from_numpy(ids)
    sums = sequence_sums(Choice(ids_TK, affinity.gather(1, ids_TK), affinity), n_sequences, shape.n_group)
    for b in range(n_sequences):
        own = range(b * shape.tokens, (b + 1) * shape.tokens)
        selected = [float(sum(e in ids[t] for t in own)) for e in range(shape.experts)]
        reached = [{int(e) // shape.size for e in ids[t]} for t in own]
        assert sums.selected_BE[b].tolist() == selected
        assert sums.sent_BG[b].tolist() == [float(sum(g in r for r in reached)) for g in range(shape.n_group)]
        np.testing.assert_allclose(sums.affinity_BE[b], s[own].sum(axis=0))
        np.testing.assert_allclose(sums.entropy_B[b], sum(-(s[t] * np.log(s[t])).sum() for t in own))
        np.testing.assert_allclose(sums.top1_B[b], sum(s[t, ids[t, 0]] for t in own))
