"""Rotary embedding against complex multiplication. Results are fp32, so 1e-6 is a few roundings."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import yarn_apply_mscale

from dsv2.config.schema import RopeScalingConfig
from dsv2.kernels.reference.rope import apply_rope
from dsv2.model.rope import rope_tables, softmax_scale
from tests.unit import reference
from tests.unit.helpers import YARN, properties

PUBLISHED = RopeScalingConfig()


def turn(x_BSHR: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    return apply_rope(x_BSHR, *rope_tables(torch.arange(x_BSHR.shape[1]), x_BSHR.shape[-1], theta))


@properties
@given(
    length=st.integers(1, 7),
    pairs=st.integers(1, 5),
    heads=st.integers(1, 3),
    batch=st.integers(1, 2),
    theta=st.sampled_from([10.0, 10000.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_interleaved_pairs_are_complex_numbers(length, pairs, heads, batch, theta, seed):
    x = np.random.default_rng(seed).standard_normal((batch, length, heads, 2 * pairs)).astype(np.float32)
    turned = turn(torch.from_numpy(x), theta).numpy()
    for b, s, h in np.ndindex(batch, length, heads):
        expected = reference.rope(x[b, s, h].astype(np.float64), s, theta)
        np.testing.assert_allclose(turned[b, s, h], expected, atol=1e-6)


def test_far_positions_keep_their_precision():
    """Angles of thousands of radians made in fp32 would be off by 2e-4."""
    x = torch.ones(1, 4096, 1, 64)
    turned = turn(x)[0, :, 0].numpy()
    for position in (1000, 4001, 4095):
        np.testing.assert_allclose(
            turned[position], reference.rope(np.ones(64), position, 10000.0), atol=1e-6
        )


def test_position_zero_is_unchanged():
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(turn(x)[:, 0], x[:, 0])
    assert not torch.isclose(turn(x)[:, 1:], x[:, 1:], atol=1e-6).any(), "every other position turns"


@properties
@given(m=st.integers(0, 20), n=st.integers(0, 20), shift=st.integers(1, 40), seed=st.integers(0, 1000))
def test_dot_product_depends_on_the_distance_only(m, n, shift, seed):
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
    rows_q, rows_k = (turn(x.expand(1, 64, 1, 8))[0, :, 0].double() for x in (q, k))
    torch.testing.assert_close(
        rows_q[m] @ rows_k[n], rows_q[m + shift] @ rows_k[n + shift], atol=1e-5, rtol=0
    )


def test_bf16_is_turned_in_fp32():
    x = torch.randn(1, 50, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = turn(x)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, turn(x.float()).bfloat16()), "one rounding, at the end"


def test_sequences_at_positions_of_their_own():
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[5, 6, 7], [0, 40, 2]])
    turned = apply_rope(x, *rope_tables(positions, 6, 100.0)).numpy()
    for b, s, h in np.ndindex(2, 3, 4):
        expected = reference.rope(x[b, s, h].double().numpy(), int(positions[b, s]), 100.0)
        np.testing.assert_allclose(turned[b, s, h], expected, atol=1e-6)


def test_without_scaling_the_tables_are_the_plain_formula_to_the_bit():
    speeds = 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    angles = torch.outer(torch.arange(4096, dtype=torch.float64), speeds)
    cos, sin = rope_tables(torch.arange(4096), 64, 10000.0)
    for table, expected in ((cos, angles.cos()), (sin, angles.sin())):
        assert torch.equal(table, expected.float())
    assert softmax_scale(192, None) == 192**-0.5


SCALINGS = {
    "published": (64, 10000.0, PUBLISHED),
    "magnitudes differ": (64, 10000.0, RopeScalingConfig(mscale=1.0, mscale_all_dim=0.707)),
    "whole head": (128, 10000.0, RopeScalingConfig(factor=8.0, beta_fast=16.0, beta_slow=2.0)),
    "tiny": (6, 100.0, YARN),
    "no scaling after all": (64, 10000.0, RopeScalingConfig(factor=1.0)),
    "all slow": (8, 10000.0, RopeScalingConfig(original_max_position_embeddings=8)),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_yarn_against_a_slow_loop(name):
    dim, theta, scaling = SCALINGS[name]
    x = np.random.default_rng(0).standard_normal(dim)
    for position in (0, 1, 77, 4095, 4096, 163839):
        tables = rope_tables(torch.tensor([position]), dim, theta, scaling)
        turned = apply_rope(torch.from_numpy(x).float().view(1, 1, 1, dim), *tables).flatten().numpy()
        np.testing.assert_allclose(turned, reference.rope(x, position, theta, scaling), atol=2e-6)
    expected = reference.softmax_scale(dim, scaling)
    assert softmax_scale(dim, scaling) == pytest.approx(expected, rel=1e-12)


def test_published_yarn_leaves_fast_pairs_and_slows_the_slow_ones_40_times():
    """Of 32 pairs: 11 turn more than 32 times in 4096 positions, 9 (from the 24th on) at most once."""
    plain = rope_tables(torch.tensor([1]), 64, 10000.0)[1][0].double().asin()
    yarn = rope_tables(torch.tensor([1]), 64, 10000.0, PUBLISHED)[1][0].double().asin()
    ratio = plain / yarn
    assert torch.equal(ratio[:11], torch.ones(11).double())
    torch.testing.assert_close(ratio[23:], torch.full((9,), 40.0).double(), rtol=1e-5, atol=0)
    assert ((ratio[11:23] > 1) & (ratio[11:23] < 40)).all()
    assert (ratio.diff()[10:22] > 0).all()
    assert softmax_scale(192, PUBLISHED) * 192**0.5 == pytest.approx((0.0707 * np.log(40) + 1) ** 2)


@pytest.mark.parametrize("name", SCALINGS)
def test_yarn_against_transformers(name):
    """Speeds and magnitude of the tables, and the softmax scale; transformers' speeds are fp32."""
    dim, theta, scaling = SCALINGS[name]
    config = DeepseekV2Config(
        hidden_size=32,
        num_attention_heads=4,
        qk_rope_head_dim=dim,
        max_position_embeddings=163840,
        rope_parameters={"rope_type": "yarn", "rope_theta": theta, **asdict(scaling)},
    )
    speeds, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config)
    cos, sin = rope_tables(torch.tensor([0, 1]), dim, theta, scaling)
    torch.testing.assert_close(cos[0], torch.full((dim // 2,), magnitude), rtol=1e-6, atol=0)
    torch.testing.assert_close((sin[1].double() / cos[1].double()).atan(), speeds.double(), rtol=1e-6, atol=0)
    assert softmax_scale(dim, scaling) == pytest.approx(
        yarn_apply_mscale(config.rope_parameters, dim**-0.5), rel=1e-12
    )
