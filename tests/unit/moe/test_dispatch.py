"""Dispatch, experts' sum and combine on one rank against a loop over tokens and experts."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv2.kernels.reference.rows import gather_rows, map_rows, sum_rows
from dsv2.moe.dispatch import combine, plan_dispatch, start_dispatch
from dsv2.moe.execution import Execution
from dsv2.parallel.mesh import ALONE
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
def test_plan_counts_the_kept_pairs(case):
    plan = plan_dispatch(case.ids_TK, case.keep_TK, case.n_experts, ALONE)
    pairs = [(t, k) for t, k in np.ndindex(*case.ids_TK.shape) if kept(case, t, k)]
    experts = [int(case.ids_TK[pair]) for pair in pairs]
    assert plan.rows_of_expert.tolist() == [experts.count(e) for e in range(case.n_experts)]
    assert [(t, k) for t, k in np.ndindex(*case.ids_TK.shape) if plan.kept_ids_TK[t, k] >= 0] == pairs
    assert plan.n_pairs == case.ids_TK.numel(), "known without asking the device"
    assert plan.exchange is None


@properties
@given(case=cases())
def test_round_trip_against_the_loop(case):
    """Expert e multiplies by e + 1: the result and both gradients, pair by pair."""
    x, weights = case.x_TD.clone().requires_grad_(), case.weights_TK.clone().requires_grad_()
    plan = plan_dispatch(case.ids_TK, case.keep_TK, case.n_experts, ALONE)
    execution = Execution()
    here = start_dispatch(x, weights, plan, execution).wait()
    pairs = map_rows(here.expert_ids_XK.where(here.expert_ids_XK >= 0, case.n_experts), plan.n_pairs)
    rows = gather_rows(here.x_XD, pairs)
    rest = torch.tensor([len(rows) - int(plan.rows_of_expert.sum())])
    factor = torch.tensor([*range(1, case.n_experts + 1), 0])  # dropped pairs stand behind all others
    factor = factor.repeat_interleave(torch.cat((plan.rows_of_expert, rest)))
    out = combine(sum_rows(rows * factor.unsqueeze(-1), pairs, len(x), here.weights_XK), plan, execution)
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


def test_map_rows_orders_by_key_then_slot():
    rows = map_rows(torch.tensor([[2, 0], [1, 9], [0, 2]]), 5)
    assert rows.slots.tolist() == [1, 4, 2, 0, 5]
    assert rows.tokens().tolist() == [0, 2, 1, 0, 2]


def test_sum_rows_of_other_tokens_do_not_change_a_token_to_the_last_bit():
    """The slots of a token are added up in their order, whoever else is in the batch."""
    generator = torch.Generator().manual_seed(0)
    y, weights = torch.randn(6, 5, 32, generator=generator), torch.rand(6, 5, generator=generator)
    keys = torch.stack([torch.randperm(8, generator=generator)[:5] for _ in range(6)])

    def summed(tokens: slice) -> torch.Tensor:
        rows = map_rows(keys[tokens], keys[tokens].numel())
        return sum_rows(y[tokens].flatten(0, 1)[rows.slots], rows, len(keys[tokens]), weights[tokens])

    together = summed(slice(0, 6))
    assert torch.equal(together, torch.cat([summed(slice(t, t + 1)) for t in range(6)]))
    torch.testing.assert_close(together, (y * weights.unsqueeze(-1)).sum(dim=1), rtol=1e-6, atol=1e-6)


def test_bf16_rows_are_weighted_and_added_up_in_fp32():
    """One rounding, at the end: bf16 weights or products would be off by 0.4 % each."""
    generator = torch.Generator().manual_seed(0)
    y, weights = torch.randn(100, 8, generator=generator).bfloat16(), torch.rand(20, 5, generator=generator)
    rows = map_rows(torch.zeros(20, 5), 100)
    out = sum_rows(y, rows, 20, weights)
    assert out.dtype == torch.bfloat16
    exact = (weights.double().unsqueeze(-1) * y.double().view(20, 5, 8)).sum(dim=1)
    assert torch.equal(out, exact.bfloat16())


def test_plan_is_frozen():
    plan = plan_dispatch(torch.tensor([[0]]), None, 1, ALONE)
    with pytest.raises(AttributeError):
        plan.n_pairs = 2
