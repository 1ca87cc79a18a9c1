"""Our model against transformers' DeepseekV2ForCausalLM: the same weights, the same function.

Where transformers 5.23 departs from the paper or from the published model's own code, ours does not
follow; the last tests show each such place and that nothing else differs there:
- It computes the angles of RoPE in fp32: at position p they are wrong by about p / 10^7 radians.
- Its norms of the two latents have eps 1e-6 whatever `rms_norm_eps` says (so has the published code;
  vLLM takes `rms_norm_eps`). The published value is 1e-6.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.config.schema import BalanceConfig, ModelConfig, RopeScalingConfig
from dsv2.model.rope import rope_tables, softmax_scale
from tests.unit.hf.folders import gradients, hf_tiny, in_published_names, our_model, their_model

LOGITS, GRADIENTS = 1e-5, 1e-4  # largest difference, relative: of all logits; of each parameter's gradient
YARN = RopeScalingConfig(factor=40, mscale=0.707, mscale_all_dim=0.707)
NO_BALANCE = BalanceConfig(alpha_expert=0, alpha_device=0, alpha_comm=0)  # transformers has no such losses
EIGHT_GROUPS = {"n_routed_experts": 16, "n_group": 8, "topk_group": 3}


def tokens(config: ModelConfig, sequences: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, config.vocab_size, (sequences, length + 1), generator=generator)


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert theirs.abs().max() > 0
    return float((ours - theirs).abs().max() / theirs.abs().max())


def gradient_difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def check_parity(config: ModelConfig, sequences: int, length: int) -> None:
    """Logits, and the gradients of the training loss, the balance losses being off."""
    ours = our_model(config).train()
    theirs = their_model(ours)
    ids = tokens(config, sequences, length)
    inputs, labels = ids[:, :-1], ids[:, 1:]
    logits = theirs(inputs).logits
    assert logits.abs().max() > 1
    with torch.no_grad():
        assert difference(ours.eval()(inputs, None, torch.arange(sequences)), logits) < LOGITS
    ours.train()(inputs, labels, torch.arange(sequences)).loss.backward()
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    expected = gradients(theirs)
    found = in_published_names(ours, gradients(ours), stacked=True)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert gradient_difference(found[name], gradient) < GRADIENTS, name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"v_head_dim": 17},  # wider than a whole query head, 14
        {"v_head_dim": 8, "qk_nope_head_dim": 8},
        {"n_group": 1, "topk_group": 1},
        {"topk_group": 4},
        EIGHT_GROUPS,
        {**EIGHT_GROUPS, "routed_scaling_factor": 16.0},
        {"routed_scaling_factor": 1.0},
        {"n_shared_experts": 1, "first_k_dense_replace": 0},
        {"rope_theta": 500.0},
        {"rope_scaling": YARN},
        {"rope_scaling": YARN, "q_lora_rank": None, **EIGHT_GROUPS, "routed_scaling_factor": 16.0},
        {"rope_scaling": RopeScalingConfig(factor=4, original_max_position_embeddings=16, mscale=1.3)},
    ],
    ids=str,
)
def test_logits_and_gradients(changes: dict[str, Any]) -> None:
    check_parity(hf_tiny(balance=NO_BALANCE, **changes), sequences=3, length=40)


@pytest.mark.parametrize("rope_scaling", [None, YARN], ids=["plain", "yarn"])
def test_positions_beyond_the_original_context(rope_scaling: RopeScalingConfig | None) -> None:
    """With 4 rotary dimensions transformers' angles are exact enough to be held to the same bound."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "qk_rope_head_dim": 4}
    check_parity(hf_tiny(balance=NO_BALANCE, rope_scaling=rope_scaling, **sizes), sequences=1, length=4200)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_of_several_lengths(side: str) -> None:
    """They pad and mask; ours runs each sequence alone."""
    ours = our_model(hf_tiny()).eval()
    theirs = their_model(ours)
    ids, lengths = tokens(ours.config, 4, 30), (30, 1, 17, 8)
    padded, mask = torch.zeros(4, 30, dtype=torch.long), torch.zeros(4, 30, dtype=torch.long)
    places = [slice(0, n) if side == "right" else slice(30 - n, 30) for n in lengths]
    for b, (place, length) in enumerate(zip(places, lengths, strict=True)):
        padded[b, place], mask[b, place] = ids[b, :length], 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # as transformers' own generate() numbers them
    with torch.no_grad():
        logits = theirs(padded, attention_mask=mask, position_ids=positions).logits
        for b, (place, length) in enumerate(zip(places, lengths, strict=True)):
            alone = ours(ids[b : b + 1, :length], None, torch.tensor([b]))
            assert difference(alone[0], logits[b, place]) < LOGITS, f"length {length}"


@pytest.mark.parametrize("rope_scaling", [None, YARN], ids=["plain", "yarn"])
def test_speeds_and_scales_at_the_published_size(rope_scaling: RopeScalingConfig | None) -> None:
    """64 rotary dimensions: every pair's speed, the tables' magnitude, and the softmax scale."""
    config = hf_tiny(rope_scaling=rope_scaling, qk_rope_head_dim=64)
    theirs = their_model(our_model(config)).model
    cos, sin = rope_tables(torch.tensor([1]), 64, config.rope_theta, rope_scaling)
    magnitude = theirs.rotary_emb.attention_scaling
    assert magnitude == pytest.approx(float((cos**2 + sin**2).sqrt().mean()), rel=1e-6)
    torch.testing.assert_close(torch.atan2(sin, cos)[0], theirs.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    for layer in theirs.layers:
        assert layer.self_attn.scaling == pytest.approx(softmax_scale(72, rope_scaling), rel=1e-12)


@pytest.mark.parametrize("rope_scaling", [None, YARN], ids=["plain", "yarn"])
def test_their_angles_are_rounded_to_fp32(rope_scaling: RopeScalingConfig | None) -> None:
    """Far out that alone takes their logits beyond the bound: with exact angles they are within it."""
    config = hf_tiny(
        num_hidden_layers=2, num_attention_heads=2, qk_rope_head_dim=16, rope_scaling=rope_scaling
    )
    ours = our_model(config).eval()
    theirs = their_model(ours)
    ids, first = tokens(config, 1, 63)[:, :-1], 100_000

    def exact(_: Tensor, position_ids: Tensor) -> Tensor:
        return torch.complex(*rope_tables(position_ids, 16, config.rope_theta, rope_scaling))

    with torch.no_grad():
        # RoPE is relative: the same tokens at far positions have the same logits.
        logits = ours(ids, None, torch.zeros(1, dtype=torch.long))
        far = torch.arange(first, first + ids.shape[1]).unsqueeze(0)
        assert difference(logits, theirs(ids, position_ids=far).logits) > 10 * LOGITS
        theirs.model.rotary_emb.forward = exact
        assert difference(logits, theirs(ids, position_ids=far).logits) < LOGITS


def test_their_latent_norms_have_an_eps_of_their_own() -> None:
    ours = our_model(hf_tiny(rms_norm_eps=1e-2)).eval()
    theirs = their_model(ours)
    ids = tokens(ours.config, 2, 20)[:, :-1]
    with torch.no_grad():
        logits = ours(ids, None, torch.arange(2))
        assert difference(logits, theirs(ids).logits) > 10 * LOGITS
        for layer in theirs.model.layers:
            for norm in (layer.self_attn.q_a_layernorm, layer.self_attn.kv_a_layernorm):
                assert norm.variance_epsilon == 1e-6
                norm.variance_epsilon = 1e-2
        assert difference(logits, theirs(ids).logits) < LOGITS
