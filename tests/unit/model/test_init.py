"""Initial weights: their distribution, and that no layout or history changes them."""

import math

import pytest
import torch
from torch import nn

from dsv2.model.init import init_weights
from dsv2.model.transformer import DeepseekV2
from dsv2.moe.experts import RoutedExperts
from tests.unit.helpers import tiny_config

STD = 0.02


def make_model(seed: int = 0, **changes) -> DeepseekV2:
    model = DeepseekV2(tiny_config(**changes))
    init_weights(model, STD, seed)
    return model


def test_distribution_of_every_matrix():
    """n draws: the mean is within 5 std / sqrt(n) of 0, their deviation within 5 / sqrt(2n) of std."""
    for name, p in make_model(hidden_size=64, vocab_size=200).named_parameters():
        if p.ndim == 1:
            continue
        w, n = p.detach().double().flatten(), p.numel()
        assert abs(w.mean()) < 5 * STD / math.sqrt(n), name
        assert abs(w.std(correction=0) / STD - 1) < 5 / math.sqrt(2 * n), name
        # Normal, neither uniform (0.577) nor cut off: 68.27 % lie within one deviation.
        within = (w.abs() < STD).double().mean()
        assert abs(within - 0.6827) < 5 * math.sqrt(0.6827 * 0.3173 / n), name


def test_the_embedding_draws_no_values_of_its_own(monkeypatch):
    """On the meta device they would import torch's compiler."""
    monkeypatch.delattr(nn.Embedding, "reset_parameters")
    with torch.device("meta"):
        model = DeepseekV2(tiny_config())
    assert model.model.embed_tokens.weight.requires_grad


def test_norms_are_one():
    model = make_model()
    norms = [m for m in model.modules() if isinstance(m, nn.RMSNorm)]
    assert len(norms) == 3 * 4 + 1
    assert all((m.weight == 1).all() for m in norms)


def test_no_two_tensors_share_their_draws():
    """The first 20 numbers of every matrix and of every single expert are its own."""
    model = make_model()
    starts = {}
    for name, p in model.named_parameters():
        if p.ndim > 1:
            parts = p if p.ndim == 3 else [p]
            starts |= {f"{name}[{i}]": tuple(part.flatten()[:20].tolist()) for i, part in enumerate(parts)}
    assert len(starts) > 12 * 4
    assert len(set(starts.values())) == len(starts)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_same_experts_however_they_are_split(ranks):
    whole = make_model()
    n_local = 12 // ranks
    for rank in range(ranks):
        share = DeepseekV2(tiny_config())
        for layer in share.decoder_layers()[1:]:
            layer.mlp.experts = RoutedExperts(
                20, 7, n_experts=12, first_expert=rank * n_local, n_local=n_local
            )
        init_weights(share, STD, seed=0)
        mine = slice(rank * n_local, (rank + 1) * n_local)
        for (name, p), q in zip(whole.named_parameters(), share.parameters(), strict=True):
            assert torch.equal(p[mine] if ".experts." in name else p, q), name


def test_neither_the_global_generator_nor_other_layers_matter():
    torch.manual_seed(1)
    first = dict(make_model().named_parameters())
    torch.manual_seed(2)
    torch.randn(3)
    before = torch.get_rng_state()
    deeper = DeepseekV2(tiny_config(num_hidden_layers=4))
    torch.set_rng_state(before)
    init_weights(deeper, STD, seed=0)
    assert torch.equal(torch.get_rng_state(), before), "nor is it touched"
    others = dict(deeper.named_parameters())
    assert all(torch.equal(p, others[name]) for name, p in first.items())


@pytest.mark.parametrize(("seed", "other"), [(0, 1), (1, 2), (7, 2**20), (0, -1), (0, 2**40)])
def test_another_seed_gives_other_weights(seed, other):
    """All of them but the norms, and unrelated ones."""
    first, second = make_model(seed), make_model(other)
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        if p.ndim > 1:
            together = torch.corrcoef(torch.stack((p.detach().flatten(), q.detach().flatten())))[0, 1]
            assert abs(together) < 5 / math.sqrt(p.numel()), name
