"""Parallel equals single: the same global batch gives the same losses, gradients and weights.

The reference is plain torch in this process. Gradients are compared through Adam's first moment after
one step, which is 0.1 times the clipped gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dsv2.config import AttentionKind, Precision
from tests.dist import jobs

STEPS = 4


@functools.cache
def _reference(micro_batches: int, changes: tuple[tuple[str, Any], ...]) -> jobs.Trace:
    return jobs.reference(STEPS, micro_batches, **dict(changes))


@pytest.fixture
def train(pools) -> Callable[..., jobs.Trace]:
    def run(world_size: int, **layout: Any) -> jobs.Trace:
        return jobs.assemble(pools[world_size].run("tests.dist.jobs:train", steps=STEPS, **layout))

    return run


LAYOUTS = [  # the rest of the grid is below, under make test-all
    # world size, EP, ZeRO stage, micro-batch (the batch is 8: accumulation is 8 / world / micro-batch)
    (2, 1, 0, 4),
    (2, 2, 0, 2),
    (2, 2, 1, 2),
    (2, 2, 2, 1),
    (2, 2, 3, 2),
    (4, 1, 1, 1),
    (4, 2, 1, 2),
    (4, 4, 2, 2),
    (4, 2, 3, 1),
    (4, 4, 3, 2),
]


@pytest.mark.parametrize(("world_size", "ep", "stage", "micro_batch"), LAYOUTS)
def test_layout_equals_one_process(train, world_size, ep, stage, micro_batch):
    got = train(world_size, ep=ep, stage=stage, micro_batch=micro_batch)
    jobs.assert_same(got, _reference(1, ()))


@pytest.mark.parametrize(("world_size", "ep", "stage"), [(2, 2, 1), (4, 2, 3)])
def test_activation_checkpointing_changes_nothing(train, world_size, ep, stage):
    got = train(world_size, ep=ep, stage=stage, micro_batch=1, recompute=True)
    jobs.assert_same(got, _reference(1, ()))


DROPPING = (("token_dropping", True), ("capacity_factor", 0.8))


@pytest.mark.parametrize(
    ("world_size", "ep", "stage", "micro_batch"),
    # 4 sequences a dispatch (micro-batch x EP) on all of them: the population that dropping ranks
    [(2, 1, 1, 4), (2, 2, 2, 2), (4, 2, 1, 2), (4, 4, 1, 1), (4, 4, 3, 1)],
)
def test_dropping_equals_one_process_with_as_many_sequences_a_dispatch(
    train, world_size, ep, stage, micro_batch
):
    want = _reference(2, DROPPING)
    assert min(want.dropped) > 0, "the reference must drop something"
    jobs.assert_same(train(world_size, ep=ep, stage=stage, micro_batch=micro_batch, **dict(DROPPING)), want)


def test_dropping_ranks_over_the_whole_ep_group(train):
    """Ranking over a rank's own tokens would drop another set: the two references differ."""
    alone, together = _reference(4, DROPPING), _reference(2, DROPPING)
    assert alone.losses[0] != pytest.approx(together.losses[0], rel=1e-6)


@pytest.mark.parametrize(("n_group", "topk_group", "ep"), [(1, 1, 2), (8, 3, 2), (2, 2, 4)])
def test_expert_groups_are_independent_of_the_layout(train, n_group, topk_group, ep):
    changes = {"n_group": n_group, "topk_group": topk_group}
    got = train(4, ep=ep, stage=1, micro_batch=1, **changes)
    jobs.assert_same(got, _reference(1, tuple(changes.items())))


@pytest.mark.parametrize(("ep", "stage"), [(2, 1), (2, 3)])
def test_grouped_query_attention_equals_one_process(train, ep, stage):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "v_head_dim": 8}
    changes: dict[str, Any] = {"attention": AttentionKind.gqa} | heads
    got = train(2, ep=ep, stage=stage, micro_batch=2, **changes)
    assert got.weights["model.layers.1.self_attn.k_proj.weight"].size == 2 * 8 * 24
    jobs.assert_same(got, _reference(1, tuple(changes.items())))


@pytest.mark.parametrize(("world_size", "ep", "stage"), [(2, 2, 1), (2, 1, 2), (2, 2, 3)])
def test_batch_that_grows_equals_one_process(train, world_size, ep, stage):
    """1, 2, 2 and 4 micro-batches a step, as on a batch ramp."""
    sizes = (2, 4, 4, 8)
    got = train(world_size, ep=ep, stage=stage, micro_batch=1, sizes=sizes)
    jobs.assert_same(got, jobs.reference(STEPS, sizes=sizes))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32(train, stage):
    """bf16 parameters with fp32 masters: the fp32 run but for bf16's 8 bits."""
    want = _reference(1, ())
    got = train(2, ep=2, stage=stage, micro_batch=2, bf16=True)
    np.testing.assert_allclose(got.losses, want.losses, rtol=5e-3)
    assert got.losses != want.losses, "nothing ran in bf16"
    np.testing.assert_allclose(got.grad_norms, want.grad_norms, rtol=3e-2)
    for name in want.weights:
        # A gradient that never came would be 1 off; a norm's sums many small terms of either sign.
        assert jobs.relative(got.first_moment[name], want.first_moment[name]) < 0.3, name
        assert jobs.relative(got.weights[name], want.weights[name]) < 1.5e-2, name


@pytest.mark.parametrize(("world_size", "ep", "micro_batch"), [(1, 1, 8), (4, 2, 1)])
def test_bf16_states_follow_fp32(train, world_size, ep, micro_batch):
    """Whether a step's gradient has one term or many."""
    want = _reference(1, ())
    got = train(world_size, ep=ep, stage=1, micro_batch=micro_batch, bf16=True, states=Precision.bf16)
    np.testing.assert_allclose(got.losses, want.losses, rtol=5e-3)
    np.testing.assert_allclose(got.grad_norms, want.grad_norms, rtol=6e-2)
    for name in want.weights:
        assert jobs.relative(got.first_moment[name], want.first_moment[name]) < 0.3, name
        assert jobs.relative(got.weights[name], want.weights[name]) < 1.5e-2, name
        assert np.array_equal(torch.from_numpy(got.weights[name]).bfloat16().float(), got.weights[name]), name


def test_rounding_of_bf16_states_does_not_look_at_the_layout(train):
    """One rank and two, each a sequence at a time: the same gradients but for the order of fp32 sums."""
    one, two = (train(n, ep=1, stage=1, micro_batch=1, bf16=True, states=Precision.bf16) for n in (1, 2))
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-4)
    same = [np.mean(one.weights[name] == two.weights[name]) for name in one.weights]
    # With random bits of its own, half of a rank's weights would be the other neighbour.
    assert np.mean(same) > 0.97
    assert min(same) > 0.9


def test_bf16_adds_up_a_step_s_gradients_in_fp32(pools):
    """Under ZeRO-1 they are fp32 already: rounding them for the ranks' sum would lose what that is for."""
    types = pools[2].run("tests.dist.jobs:types_reduced", ep=1, stage=1, micro_batch=2, bf16=True)
    assert types == [{torch.float32}] * 2


@pytest.mark.full
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("world_size", "ep", "micro_batch"),
    [(1, 1, m) for m in (1, 2, 4, 8)]
    + [(2, e, m) for e in (1, 2) for m in (1, 2, 4)]
    + [(4, e, m) for e in (1, 2, 4) for m in (1, 2)],
)
def test_every_layout_equals_one_process(train, world_size, ep, micro_batch, stage, recompute):
    got = train(world_size, ep=ep, stage=stage, micro_batch=micro_batch, recompute=recompute)
    jobs.assert_same(got, _reference(1, ()))
