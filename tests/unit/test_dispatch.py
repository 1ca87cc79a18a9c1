"""Dispatch and combine on one rank against a loop over tokens and experts."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv2.moe.dispatch import combine, dispatch
from tests.unit.helpers import properties

WIDTH = 3


class Case(NamedTuple):
    x_TD: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    keep_TK: torch.Tensor | None
    n_experts: int


@st.composite
def cases(draw) -> Case:
    """Few tokens for many experts, so that some experts get none."""
    n_experts, tokens = draw(st.integers(1, 8)), draw(st.integers(1, 10))
    top_k = draw(st.integers(1, n_experts))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    ids = np.stack([rng.permutation(n_experts)[:top_k] for _ in range(tokens)])
    share = draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
    return Case(
        torch.from_numpy(rng.standard_normal((tokens, WIDTH)).astype(np.float32)),
        torch.from_numpy(ids),
        torch.from_numpy(rng.random((tokens, top_k), dtype=np.float32)),
        None if share is None else torch.from_numpy(rng.random((tokens, top_k)) < share),
        n_experts,
    )


def kept(case: Case, t: int, k: int) -> bool:
    return case.keep_TK is None or bool(case.keep_TK[t, k])


@properties
@given(case=cases())
def test_rows_are_grouped_by_expert(case):
    rows, plan = dispatch(case.x_TD, case.ids_TK, case.keep_TK, case.n_experts, None)
    tokens, top_k = case.ids_TK.shape
    expected, counts = [], []
    for e in range(case.n_experts):
        mine = [t for t in range(tokens) for k in range(top_k) if case.ids_TK[t, k] == e and kept(case, t, k)]
        expected += [case.x_TD[t].tolist() for t in mine]
        counts.append(len(mine))
    assert rows.tolist() == expected
    assert plan.rows_of_expert == counts
    assert plan.sent == plan.received == [len(expected)]


@properties
@given(case=cases())
def test_round_trip_against_the_loop(case):
    """Expert e multiplies by e + 1: the result and both gradients, pair by pair."""
    x, weights = case.x_TD.clone().requires_grad_(), case.weights_TK.clone().requires_grad_()
    rows, plan = dispatch(x, case.ids_TK, case.keep_TK, case.n_experts, None)
    factor = torch.arange(1, case.n_experts + 1).repeat_interleave(torch.tensor(plan.rows_of_expert))
    out = combine(rows * factor.unsqueeze(-1), weights, plan)
    readout = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out * readout).sum().backward()

    expected, x_grad, weights_grad = torch.zeros(out.shape), torch.zeros(x.shape), torch.zeros(weights.shape)
    for t, k in np.ndindex(*case.ids_TK.shape):
        if kept(case, t, k):
            scale = float(case.ids_TK[t, k]) + 1
            expected[t] += case.weights_TK[t, k] * scale * case.x_TD[t]
            x_grad[t] += case.weights_TK[t, k] * scale * readout[t]
            weights_grad[t, k] = scale * readout[t] @ case.x_TD[t]
    # Sums of at most 8 fp32 terms of up to 30.
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, x_grad, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(weights.grad, weights_grad, atol=2e-5, rtol=1e-5)


def test_a_token_whose_pairs_are_all_dropped_gets_nothing():
    x, ids = torch.ones(2, WIDTH), torch.tensor([[0, 1], [0, 1]])
    keep = torch.tensor([[False, False], [True, False]])
    rows, plan = dispatch(x, ids, keep, 2, None)
    assert len(rows) == 1
    out = combine(rows, torch.full((2, 2), 0.5), plan)
    assert out.tolist() == [[0.0] * WIDTH, [0.5] * WIDTH]


def test_other_tokens_do_not_change_a_token_to_the_last_bit():
    """The pairs of a token are added up in the order of its experts, whoever else is in the batch."""
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(6, 32, generator=generator), torch.rand(6, 5, generator=generator)
    ids = torch.stack([torch.randperm(8, generator=generator)[:5] for _ in range(6)])
    together = combine(*_identity(x, ids, weights))
    alone = torch.cat(
        [combine(*_identity(x[t : t + 1], ids[t : t + 1], weights[t : t + 1])) for t in range(6)]
    )
    assert torch.equal(together, alone)


def _identity(x, ids, weights):
    rows, plan = dispatch(x, ids, None, 8, None)
    return rows, weights, plan


def test_bf16_rows_are_weighted_and_added_up_in_fp32():
    """One rounding, at the end: bf16 weights or products would be off by 0.4 % each."""
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(20, 8, generator=generator).bfloat16(), torch.rand(20, 5, generator=generator)
    ids = torch.stack([torch.randperm(8, generator=generator)[:5] for _ in range(20)])
    out = combine(*_identity(x, ids, weights))
    assert out.dtype == torch.bfloat16
    exact = sum(weights[:, k : k + 1].double() * x.double() for k in range(5))
    assert torch.equal(out, exact.bfloat16())


def test_plan_is_frozen():
    _, plan = dispatch(torch.ones(1, 1), torch.tensor([[0]]), None, 1, None)
    with pytest.raises(AttributeError):
        plan.top_k = 2
