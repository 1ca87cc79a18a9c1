"""Rotary embedding against complex multiplication. Results are fp32, so 1e-6 is a few roundings."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv2.model.rope import apply_rope, rope_tables
from tests.unit import reference
from tests.unit.helpers import properties

CPU = torch.device("cpu")


def turn(x_BSHR: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    return apply_rope(x_BSHR, *rope_tables(x_BSHR.shape[1], x_BSHR.shape[-1], theta, CPU))


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
