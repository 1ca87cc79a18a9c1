"""The whole decoder against loops, and its training loss."""

import math

import numpy as np
import pytest
import torch

from dsv2.config.schema import BalanceConfig
from dsv2.model.init import init_weights
from dsv2.model.transformer import DeepseekV2, ModelOutput
from dsv2.moe.execution import Execution
from dsv2.moe.experts import SwiGLU
from dsv2.moe.layer import MoELayer
from dsv2.moe.stats import RoutingStats
from tests.unit import reference
from tests.unit.helpers import KINDS, YARN, tiny_config

SEQUENCES, LENGTH = 2, 9


def make_model(recompute: bool = False, **changes) -> DeepseekV2:
    """fp64, with norms far from 1."""
    model = DeepseekV2(tiny_config(**changes), Execution(recompute=recompute)).double()
    init_weights(model, std=0.3, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.copy_(1 + torch.rand(p.shape, generator=generator, dtype=torch.float64))
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 31, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    return ids[:, :-1], ids[:, 1:], torch.arange(SEQUENCES)


@pytest.mark.parametrize("scaling", [None, YARN])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_against_the_equations(kind, scaling):
    model = make_model(**KINDS[kind], rope_scaling=scaling, rope_theta=100.0).eval()
    ids, _, sequence_ids = batch()
    logits = model(ids, None, sequence_ids)
    assert logits.dtype == torch.float32
    weights = reference.weights_of(model)
    for b in range(SEQUENCES):
        expected = reference.transformer(ids[b].tolist(), weights, model.config)
        assert np.abs(expected).max() > 1
        # Rotation, affinities and the experts' sum are fp32, and errors pass through three layers
        # and softmaxes, which YaRN makes sharper.
        np.testing.assert_allclose(logits[b].detach().numpy(), expected, atol=5e-5)


def test_loss_is_cross_entropy_plus_balance_summed_over_layers():
    model = make_model()
    ids, labels, sequence_ids = batch()
    out = model(ids, labels, sequence_ids)
    logits = model(ids, None, sequence_ids).double()
    nats = [
        -math.log(reference.softmax(logits[b, t].detach().numpy())[labels[b, t]])
        for b, t in np.ndindex(SEQUENCES, LENGTH)
    ]
    assert out.lm_loss.item() == pytest.approx(np.mean(nats), rel=1e-5)
    _, routing = model.hidden_states(ids, sequence_ids)
    assert len(routing) == 2, "three layers, the first is dense"
    alone = [model.losses_and_stats([layer], LENGTH)[0] for layer in routing]
    weighted = sum(0.3 * x.expert + 0.5 * x.device + 0.7 * x.comm for x in alone)
    assert out.loss.item() == pytest.approx((out.lm_loss + weighted).item(), rel=1e-6)
    for name in ("expert", "device", "comm"):
        assert getattr(out.balance, name).tolist() == [getattr(x, name).item() for x in alone], "raw"
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in (out.lm_loss, *out.balance, *out.stats))


def test_balance_gradient_is_scaled_by_the_alphas():
    """The loss is linear in them: the gradient at alphas a is that at 0 plus a times the losses' own."""
    ids, labels, sequence_ids = batch()

    def gate_gradient(*alphas: float) -> torch.Tensor:
        model = make_model(balance=BalanceConfig(*alphas))
        model(ids, labels, sequence_ids).loss.backward()
        return model.decoder_layers()[2].mlp.gate.weight.grad

    plain = gate_gradient(0, 0, 0)
    units = [gate_gradient(*row) - plain for row in np.eye(3)]
    assert all(unit.abs().max() > 1e-4 for unit in units)
    mixed = plain + 0.3 * units[0] + 0.5 * units[1] + 0.7 * units[2]
    torch.testing.assert_close(gate_gradient(0.3, 0.5, 0.7), mixed, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dense", [0, 1, 2])
def test_first_layers_are_dense(dense):
    model = make_model(first_k_dense_replace=dense)
    kinds = [type(layer.mlp) for layer in model.decoder_layers()]
    assert kinds == [SwiGLU] * dense + [MoELayer] * (3 - dense)
    out = model(*batch())
    assert out.stats.load_E.shape == (3 - dense, 12)
    assert out.stats.load_E.sum(dim=1).tolist() == [SEQUENCES * LENGTH * 3] * (3 - dense)


def test_causality():
    model = make_model().eval()
    ids, _, sequence_ids = batch()
    other = ids.clone()
    other[:, 5] = (other[:, 5] + 1) % 31
    before, after = model(ids, None, sequence_ids), model(other, None, sequence_ids)
    # Rows meet other rows in the experts' products; fp64 leaves 1e-12, the fp32 parts nothing.
    torch.testing.assert_close(before[:, :5], after[:, :5], atol=1e-6, rtol=0)
    assert ((before - after)[:, 5:].abs().amax(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_finite_gradient(kind):
    """Not zero either, but for words that do not occur and experts without a token."""
    model = make_model(**KINDS[kind])
    out = model(*batch())
    out.loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        if ".experts." in name:
            layer = int(name.split(".")[2])
            nonzero = (p.grad != 0).flatten(1).any(dim=1)
            assert torch.equal(nonzero, out.stats.load_E[layer - 1] > 0), name
        elif p.ndim == 2 and "embed" not in name:
            assert (p.grad != 0).any(dim=1).all(), name
        elif p.ndim == 1:
            assert (p.grad != 0).all(), name


def run_once(recompute: bool) -> tuple[ModelOutput, dict[str, torch.Tensor]]:
    dropping = BalanceConfig(token_dropping=True, capacity_factor=0.7, exempt_fraction=0.0)
    model = make_model(recompute=recompute, balance=dropping).train()
    out = model(*batch())
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


def test_recomputation_changes_neither_gradients_nor_statistics():
    plain, plain_grads = run_once(recompute=False)
    again, again_grads = run_once(recompute=True)
    assert plain.stats.dropped_E.sum() > 0
    assert again.stats.tokens.tolist() == [SEQUENCES * LENGTH] * 2, "not counted twice"
    for name, a, b in zip(RoutingStats._fields, plain.stats, again.stats, strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(plain.loss, again.loss)
    for name, grad in plain_grads.items():
        assert torch.equal(grad, again_grads[name]), name


def test_recomputation_keeps_no_activations():
    """Else the test above would hold for a switch that does nothing."""

    def saved(recompute: bool) -> int:
        kept: list[int] = []
        model = make_model(recompute=recompute)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            model(*batch())
        return sum(kept)

    assert saved(True) < saved(False) / 2


def test_gradient_is_the_mean_over_micro_batches():
    """Losses are per sequence: accumulating halves of the batch gives the whole batch's gradient."""
    ids, labels, sequence_ids = batch()
    whole, halves = make_model(), make_model()
    whole(ids, labels, sequence_ids).loss.backward()
    for b in range(2):
        (halves(ids[b : b + 1], labels[b : b + 1], sequence_ids[b : b + 1]).loss / 2).backward()
    grads = dict(halves.named_parameters())
    for name, p in whole.named_parameters():
        torch.testing.assert_close(p.grad, grads[name].grad, atol=1e-6, rtol=1e-5, msg=name)


def test_published_names():
    names = {name for name, _ in make_model().named_parameters()}
    assert {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.1.self_attn.kv_b_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.shared_experts.down_proj.weight",
        "model.layers.1.mlp.experts.w13",
    } <= names
    assert not any(name.endswith("bias") for name in names)


def test_a_few_steps_learn_the_batch():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        out = model(*batch())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.lm_loss.item())
    assert losses[0] > 3
    assert losses[-1] < 0.1, "18 labels are learnt by heart"
