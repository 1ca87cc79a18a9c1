"""Dispatch, experts' sum and combine on one rank against a loop over tokens and experts."""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv2.kernels.reference.rows import copy_rows, map_rows, rows_by_rank, sum_rows
from dsv2.moe.dispatch import Dispatch, start_dispatch
from dsv2.moe.execution import Execution
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


def dispatch_of(case: Case, x: torch.Tensor, weights: torch.Tensor) -> Dispatch:
    load = torch.bincount(case.ids_TK.flatten(), minlength=case.n_experts).float()
    return start_dispatch(x, weights, case.ids_TK, case.keep_TK, load, Execution())


@properties
@given(case=cases())
def test_the_kept_pairs_are_counted(case):
    dispatch = dispatch_of(case, case.x_TD, case.weights_TK)
    here = dispatch.arrive()
    pairs = [(t, k) for t, k in np.ndindex(*case.ids_TK.shape) if kept(case, t, k)]
    experts = [int(case.ids_TK[pair]) for pair in pairs]
    assert here.rows_of_expert.tolist() == [experts.count(e) for e in range(case.n_experts)]
    assert dispatch.kept_E.tolist() == here.rows_of_expert.tolist()
    assert [(t, k) for t, k in np.ndindex(*case.ids_TK.shape) if here.expert_ids_XK[t, k] >= 0] == pairs
    assert here.n_pairs == case.ids_TK.numel(), "known without asking the device"
    assert (dispatch.rows_out, dispatch.rows_in) == (0, 0)


@properties
@given(case=cases())
def test_a_row_for_each_rank_of_a_token(case):
    """By rank, then by token; each (token, rank) once, whatever the number of its experts there."""
    n_local = 2
    ids = case.ids_TK if case.keep_TK is None else case.ids_TK.masked_fill(~case.keep_TK, -1)
    n_ranks = -(-case.n_experts // n_local)
    rows, counts = rows_by_rank(ids, n_local, n_ranks)
    reached = [sorted({e // n_local for e in of_token if e >= 0}) for of_token in ids.tolist()]
    want = [t * n_ranks + w for w in range(n_ranks) for t, ranks in enumerate(reached) if w in ranks]
    assert rows.slots[: len(want)].tolist() == want
    assert counts.tolist() == [sum(w in ranks for ranks in reached) for w in range(n_ranks)]
    places = {slot: row for row, slot in enumerate(want)}
    assert rows.places.flatten().tolist() == [places.get(slot, -1) for slot in range(len(ids) * n_ranks)]


@properties
@given(case=cases())
def test_round_trip_against_the_loop(case):
    """Expert e multiplies by e + 1: the result and both gradients, pair by pair."""
    x, weights = case.x_TD.clone().requires_grad_(), case.weights_TK.clone().requires_grad_()
    dispatch = dispatch_of(case, x, weights)
    here = dispatch.arrive()
    pairs = map_rows(here.expert_ids_XK.where(here.expert_ids_XK >= 0, case.n_experts), here.n_pairs)
    rows = copy_rows(here.x_XD, pairs)
    rest = torch.tensor([len(rows) - int(here.rows_of_expert.sum())])
    factor = torch.tensor([*range(1, case.n_experts + 1), 0])  # dropped pairs stand behind all others
    factor = factor.repeat_interleave(torch.cat((here.rows_of_expert, rest)))
    out = dispatch.combine(sum_rows(rows * factor.unsqueeze(-1), pairs, len(x), here.weights_XK))
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
