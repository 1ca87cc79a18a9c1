"""Multi-head Latent Attention against eqs. 37-47, one token and head at a time."""

import numpy as np
import pytest
import torch

from dsv2.model.attention.mla_module import MultiHeadLatentAttention
from dsv2.model.rope import rope_tables
from tests.unit import reference
from tests.unit.helpers import YARN, tiny_config

# Everything is fp64 but the rotation, which rounds to fp32 (6e-8 of values around 1).
ATOL = 1e-6


def make_attention(seed: int = 0, **changes) -> MultiHeadLatentAttention:
    """fp64, with weights large enough that attention is far from uniform and norms far from 1."""
    attention = MultiHeadLatentAttention(tiny_config(**changes)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in attention.parameters():
            scale = 1.5 * p.shape[-1] ** -0.5 if p.ndim > 1 else 1.0
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale)
    return attention


def tokens(batch: int, length: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed)).double()


def run(
    attention: MultiHeadLatentAttention, x_BSD: torch.Tensor, theta: float = 10000.0, scaling=None
) -> torch.Tensor:
    return attention(x_BSD, rope_tables(torch.arange(x_BSD.shape[1]), attention.rope_dim, theta, scaling))


@pytest.mark.parametrize("scaling", [None, YARN])
@pytest.mark.parametrize("q_lora_rank", [None, 14])
@pytest.mark.parametrize("v_head_dim", [5, 8, 14, 17])  # below, at and above the key's widths 8 and 14
def test_against_the_equations(q_lora_rank, v_head_dim, scaling):
    changes = {"q_lora_rank": q_lora_rank, "v_head_dim": v_head_dim, "rope_scaling": scaling}
    config, attention = tiny_config(rope_theta=100.0, **changes), make_attention(**changes)
    x = tokens(2, 6, config.hidden_size)
    out = run(attention, x, config.rope_theta, scaling).detach().numpy()
    weights = reference.weights_of(attention)
    for b in range(2):
        expected = reference.mla(x[b].numpy(), weights, config)
        assert np.abs(expected).max() > 0.5, "the test's own scale, which ATOL is measured against"
        np.testing.assert_allclose(out[b], expected, atol=ATOL)


def test_published_parameter_names_and_shapes():
    shapes = {name: tuple(p.shape) for name, p in make_attention().named_parameters()}
    assert shapes == {
        "q_a_proj.weight": (14, 20),
        "q_a_layernorm.weight": (14,),
        "q_b_proj.weight": (3 * (8 + 6), 14),
        "kv_a_proj_with_mqa.weight": (10 + 6, 20),  # one decoupled key, not one a head
        "kv_a_layernorm.weight": (10,),
        "kv_b_proj.weight": (3 * (8 + 5), 10),
        "o_proj.weight": (20, 3 * 5),
    }
    assert "q_proj.weight" in dict(make_attention(q_lora_rank=None).named_parameters())


@pytest.mark.parametrize("changed", [0, 3, 6])
def test_a_token_reaches_none_before_it(changed):
    attention, x = make_attention(), tokens(2, 7, 20)
    other = x.clone()
    other[0, changed] += 1.0
    before, after = run(attention, x), run(attention, other)
    assert torch.equal(before[0, :changed], after[0, :changed])
    assert torch.equal(before[1], after[1]), "the other sequence is not touched"
    assert not torch.isclose(before[0, changed:], after[0, changed:], atol=1e-4).all(dim=-1).any()


def test_decoupled_key_is_shared_by_all_heads_and_taken_from_h():
    """With o_proj the identity the heads' outputs stand side by side."""
    attention = make_attention(hidden_size=15)
    x = tokens(1, 6, 15)
    with torch.no_grad():
        attention.o_proj.weight.copy_(torch.eye(15))
        before = run(attention, x).unflatten(-1, (3, 5))
        attention.kv_a_proj_with_mqa.weight[10:] *= -1  # W_KR alone
        after = run(attention, x).unflatten(-1, (3, 5))
    assert torch.equal(before[:, 0], after[:, 0]), "a first token attends to itself whatever the key"
    assert ((before - after)[:, 1:].abs().amax(dim=-1) > 1e-4).all(), "every head at every later token"


def test_gradients_by_finite_differences():
    """Along one random direction a parameter; fp32 rotation bounds the precision of the difference."""
    attention, x = make_attention(), tokens(1, 4, 20)
    readout = tokens(1, 4, 20, seed=2)
    (run(attention, x) * readout).sum().backward()
    generator, step = torch.Generator().manual_seed(3), 1e-3
    for name, p in attention.named_parameters():
        direction = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            sides = []
            for sign in (1, -1):
                p += sign * step * direction
                sides.append((run(attention, x) * readout).sum())
                p -= sign * step * direction
        difference = (sides[0] - sides[1]) / (2 * step)
        slope = (p.grad * direction).sum()
        torch.testing.assert_close(slope, difference, rtol=1e-3, atol=1e-3, msg=name)
