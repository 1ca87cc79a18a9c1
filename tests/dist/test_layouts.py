"""What else must follow one process of plain torch on several ranks: other attention, a batch that grows,
bf16. That the layout changes nothing is test_invariance.py's.
"""

from typing import Any

import numpy as np
import pytest
import torch

from dsv2.config.schema import Precision
from tests.dist import jobs, traces

STEPS = 4


@pytest.mark.parametrize(("ep", "stage"), [(2, 1), (2, 3)])
def test_grouped_query_attention_equals_one_process(train, ep, stage):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "v_head_dim": 8}
    changes: dict[str, Any] = {"attention": "gqa"} | heads
    got = train(2, STEPS, ep=ep, stage=stage, micro_batch=2, **changes)
    assert got.weights["model.layers.1.self_attn.k_proj.weight"].size == 2 * 8 * 24
    traces.assert_same(got, jobs.reference(STEPS, **changes))


@pytest.mark.parametrize(("world_size", "ep", "stage"), [(2, 2, 1), (2, 1, 2), (2, 2, 3)])
def test_batch_that_grows_equals_one_process(train, world_size, ep, stage):
    """1, 2, 2 and 4 micro-batches a step, as on a batch ramp."""
    sizes = (2, 4, 4, 8)
    got = train(world_size, STEPS, ep=ep, stage=stage, micro_batch=1, sizes=sizes)
    traces.assert_same(got, jobs.reference(STEPS, sizes=sizes))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32(train, stage):
    """bf16 parameters with fp32 masters: the fp32 run but for bf16's 8 bits."""
    want = jobs.reference(STEPS)
    got = train(2, STEPS, ep=2, stage=stage, micro_batch=2, bf16=True)
    np.testing.assert_allclose(got.losses, want.losses, rtol=5e-3)
    assert got.losses != want.losses, "nothing ran in bf16"
    np.testing.assert_allclose(got.grad_norms, want.grad_norms, rtol=3e-2)
    for name in want.weights:
        # A gradient that never came would be 1 off; a norm's sums many small terms of either sign.
        assert traces.relative(got.first_moment[name], want.first_moment[name]) < 0.3, name
        assert traces.relative(got.weights[name], want.weights[name]) < 1.5e-2, name


@pytest.mark.parametrize(("world_size", "ep", "micro_batch"), [(1, 1, 8), (4, 2, 1)])
def test_bf16_states_follow_fp32(train, world_size, ep, micro_batch):
    """Whether a step's gradient has one term or many."""
    want = jobs.reference(STEPS)
    got = train(world_size, STEPS, ep=ep, stage=1, micro_batch=micro_batch, bf16=True, states=Precision.bf16)
    np.testing.assert_allclose(got.losses, want.losses, rtol=5e-3)
    np.testing.assert_allclose(got.grad_norms, want.grad_norms, rtol=6e-2)
    for name in want.weights:
        assert traces.relative(got.first_moment[name], want.first_moment[name]) < 0.3, name
        assert traces.relative(got.weights[name], want.weights[name]) < 1.5e-2, name
        assert np.array_equal(torch.from_numpy(got.weights[name]).bfloat16().float(), got.weights[name]), name


def test_rounding_of_bf16_states_does_not_look_at_the_layout(train):
    """One rank and two, each a sequence at a time: the same gradients but for the order of fp32 sums."""
    one, two = (
        train(n, STEPS, ep=1, stage=1, micro_batch=1, bf16=True, states=Precision.bf16) for n in (1, 2)
    )
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-4)
    same = [np.mean(one.weights[name] == two.weights[name]) for name in one.weights]
    # With random bits of its own, half of a rank's weights would be the other neighbour.
    assert np.mean(same) > 0.97
    assert min(same) > 0.9


def test_bf16_adds_up_a_step_s_gradients_in_fp32(pools):
    """Under ZeRO-1 they are fp32 already: rounding them for the ranks' sum would lose what that is for."""
    types = pools[2].run("tests.dist.jobs:types_reduced", ep=1, stage=1, micro_batch=2, bf16=True)
    assert types == [{torch.float32}] * 2
