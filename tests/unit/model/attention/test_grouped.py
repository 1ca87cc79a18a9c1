"""MHA, GQA and MQA against loops over tokens and heads."""

import numpy as np
import pytest
import torch

from dsv2.kernels.sets import REFERENCE
from dsv2.model.attention.grouped_module import GroupedQueryAttention
from dsv2.model.attention.kinds import attention_kind
from dsv2.model.attention.mla_module import MultiHeadLatentAttention
from dsv2.model.rope import rope_tables
from tests.unit import reference
from tests.unit.helpers import KINDS, YARN, tiny_config


def builds(kind: str) -> type:
    """The class of the module that a kind builds."""
    config = tiny_config(**KINDS[kind])
    return type(attention_kind(config).build(config, REFERENCE))


DENSE = [kind for kind in KINDS if builds(kind) is GroupedQueryAttention]


def make_attention(kind: str, **changes) -> GroupedQueryAttention:
    """fp64, with weights large enough that attention is far from uniform."""
    config = tiny_config(**KINDS[kind], **changes)
    attention = attention_kind(config).build(config, REFERENCE)
    assert isinstance(attention, GroupedQueryAttention)
    attention = attention.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in attention.parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator, dtype=torch.float64) * 1.5 * p.shape[-1] ** -0.5
            )
    return attention


@pytest.mark.parametrize("scaling", [None, YARN])
@pytest.mark.parametrize("kind", DENSE)
def test_against_loops(kind, scaling):
    config = tiny_config(**KINDS[kind], rope_theta=100.0, rope_scaling=scaling)
    attention = make_attention(kind, rope_scaling=scaling)
    x = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(1)).double()
    assert attention_kind(config).rotary_width(config) == 8, "RoPE turns the whole head"
    out = attention(x, rope_tables(torch.arange(6), 8, 100.0, scaling)).detach().numpy()
    for b in range(2):
        expected = reference.gqa(x[b].numpy(), reference.weights_of(attention), config)
        assert np.abs(expected).max() > 0.5, "the test's own scale, which the tolerance is measured against"
        np.testing.assert_allclose(out[b], expected, atol=1e-6)


@pytest.mark.parametrize(("kind", "heads", "groups"), [("mha", 3, 3), ("gqa", 6, 2), ("mqa", 3, 1)])
def test_shapes_of_the_weights(kind, heads, groups):
    assert {name: tuple(p.shape) for name, p in make_attention(kind).named_parameters()} == {
        "q_proj.weight": (heads * 8, 20),
        "k_proj.weight": (groups * 8, 20),
        "v_proj.weight": (groups * 8, 20),
        "o_proj.weight": (20, heads * 8),
    }


def test_the_kind_is_chosen_by_name():
    assert {"mha", "gqa", "mqa"} <= set(DENSE)
    assert builds("mla") is MultiHeadLatentAttention
