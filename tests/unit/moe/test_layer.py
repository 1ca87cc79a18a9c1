"""The DeepSeekMoE layer against eq. 20, its statistics against loops."""

import numpy as np
import pytest
import torch

from dsv2.config.schema import BalanceConfig, ModelConfig
from dsv2.kernels.types import Choice, Routing
from dsv2.moe.drop import exempt_sequences
from dsv2.moe.execution import Execution
from dsv2.moe.layer import MoELayer
from dsv2.moe.routers.module import RouterModule
from dsv2.moe.routers.softmax_topk import SoftmaxTopK
from dsv2.moe.stats import RoutingStats
from tests.unit import reference
from tests.unit.helpers import report_of, tiny_config

SEQUENCES, LENGTH = 3, 5
# The model is fp64; affinities are fp32 by contract and the weighted sum is taken in fp32, of values up
# to 10: a few roundings of 6e-7.
ATOL = 5e-6
DROPPING = BalanceConfig(token_dropping=True, capacity_factor=0.6, exempt_fraction=0.4)


def make_layer(**changes) -> MoELayer:
    layer = MoELayer(tiny_config(**changes), Execution()).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * p.shape[-1] ** -0.5)
        layer.gate.weight *= 1.5
    return layer


def tokens() -> torch.Tensor:
    return torch.randn(SEQUENCES, LENGTH, 20, generator=torch.Generator().manual_seed(1)).double()


def sequence_ids() -> torch.Tensor:
    """In a mixed order, one of them exempt under DROPPING."""
    return torch.tensor([9, 4, 6])


def limits(config: ModelConfig) -> tuple[int, int, int]:
    return config.num_experts_per_tok, config.n_group, config.topk_group


def slow_routing(layer: MoELayer, x_TD: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    gate = reference.weights_of(layer)["gate.weight"]
    s = np.array([reference.affinities(u, gate) for u in x_TD])
    return s, [reference.select(list(row), *limits(layer.config)) for row in s]


def slow_keep(layer: MoELayer, x_TD: np.ndarray, ids: list[int]) -> list[list[bool]]:
    """Section 2.2.4 over the whole batch; pairs in the sequences' global order."""
    config, (s, chosen) = layer.config, slow_routing(layer, x_TD)
    size = config.n_routed_experts // config.n_group
    exempt = exempt_sequences(torch.tensor(ids), config.balance.exempt_fraction, 0).tolist()
    order = sorted(range(len(x_TD)), key=lambda t: (ids[t // LENGTH], t))
    pairs = [(t, i) for t in order for i in chosen[t]]
    budget = int(config.balance.capacity_factor * len(pairs) / config.n_group)
    kept = reference.kept(
        [s[t, i] for t, i in pairs],
        [i // size for _, i in pairs],
        [exempt[t // LENGTH] for t, _ in pairs],
        config.n_group,
        budget,
    )
    stays = dict(zip(pairs, kept, strict=True))
    return [[stays[t, i] for i in chosen[t]] for t in range(len(x_TD))]


@pytest.mark.parametrize("n_shared_experts", [0, 1, 2])
@pytest.mark.parametrize(("n_group", "topk_group"), [(4, 2), (4, 4), (1, 1)])
@pytest.mark.parametrize("scaling", [1.0, 16.0])
def test_against_equation_20(n_shared_experts, n_group, topk_group, scaling):
    layer = make_layer(
        n_shared_experts=n_shared_experts,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=scaling,
    )
    x = tokens()
    y = layer(x, sequence_ids()).y_BSD.detach().flatten(0, 1).numpy()
    weights = reference.weights_of(layer)
    expected = reference.moe(x.flatten(0, 1).numpy(), weights, *limits(layer.config), scaling)
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(y, expected, atol=ATOL)


class LastThree(RouterModule):
    """Every token goes to the last three experts, with weights that are not its affinities."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, x_TD: torch.Tensor) -> Routing:
        affinity_TE = (x_TD @ self.weight.T).float().softmax(dim=-1)
        ids_TK = torch.tensor([[11, 10, 9]]).expand(len(x_TD), 3)
        choice = Choice(ids_TK, affinity_TE.gather(1, ids_TK), affinity_TE)
        return Routing(choice, weights_TK=torch.full((len(x_TD), 3), 0.5))


class LastThreeSpec(SoftmaxTopK):
    name = "last_three"

    def build(self, model: ModelConfig, kernels: object) -> LastThree:
        return LastThree(model)


def test_the_layer_has_the_router_that_model_router_names(monkeypatch):
    monkeypatch.setattr("dsv2.moe.routers.kinds.ROUTERS", (SoftmaxTopK(), LastThreeSpec()))
    layer = make_layer(router="last_three", n_shared_experts=0)
    x = tokens()
    out = layer(x, sequence_ids())
    w = reference.weights_of(layer)
    flat = x.flatten(0, 1).numpy()
    experts = [(w["experts.w13"][i, :7], w["experts.w13"][i, 7:], w["experts.w2"][i]) for i in (9, 10, 11)]
    expected = [0.5 * sum(reference.swiglu(u, *expert) for expert in experts) for u in flat]
    np.testing.assert_allclose(out.y_BSD.detach().flatten(0, 1).numpy(), expected, atol=ATOL)
    s = np.array([reference.affinities(u, w["gate.weight"]) for u in flat])
    _, stats = report_of(layer.config, out, LENGTH)
    np.testing.assert_allclose(stats.top1.item(), s[:, 11].sum(), rtol=1e-5)
    assert stats.load_E.tolist() == [[0.0] * 9 + [len(flat)] * 3]


def test_one_wide_shared_network_is_the_sum_of_separate_experts():
    layer, x = make_layer(n_shared_experts=3), tokens()
    width = layer.config.moe_intermediate_size
    w = reference.below(reference.weights_of(layer), "shared_experts.")
    assert w["gate_proj.weight"].shape == (3 * width, 20)
    expected = np.zeros((SEQUENCES * LENGTH, 20))
    for n in range(3):
        mine = slice(n * width, (n + 1) * width)
        matrices = (w["gate_proj.weight"][mine], w["up_proj.weight"][mine], w["down_proj.weight"][:, mine])
        expected += [reference.swiglu(u, *matrices) for u in x.flatten(0, 1).numpy()]
    shared = layer.shared_experts(x).detach().flatten(0, 1).numpy()
    np.testing.assert_allclose(shared, expected, rtol=1e-12, atol=1e-12)


def test_dropped_pairs_contribute_nothing():
    layer, x, ids = make_layer(balance=DROPPING), tokens(), sequence_ids()
    keep = slow_keep(layer, x.flatten(0, 1).numpy(), ids.tolist())
    assert 0 < sum(map(sum, keep)) < len(keep) * 3, "the case drops some pairs and not all"
    out = layer.train()(x, ids)
    expected = reference.moe(
        x.flatten(0, 1).numpy(), reference.weights_of(layer), *limits(layer.config), 2.5, keep
    )
    np.testing.assert_allclose(out.y_BSD.detach().flatten(0, 1).numpy(), expected, atol=ATOL)


def test_nothing_is_dropped_in_eval_mode():
    dropping, plain = make_layer(balance=DROPPING), make_layer()
    x, ids = tokens(), sequence_ids()
    trained, evaluated = dropping.train()(x, ids), dropping.eval()(x, ids)
    assert torch.equal(evaluated.y_BSD, plain(x, ids).y_BSD)
    assert evaluated.routing.kept_E.sum() == evaluated.routing.sums.selected_BE.sum()
    assert not torch.isclose(evaluated.y_BSD, trained.y_BSD, atol=1e-3).all()


def test_balance_losses_are_those_of_the_routing_before_dropping():
    layer, x = make_layer(balance=DROPPING).train(), tokens()
    s, chosen = slow_routing(layer, x.flatten(0, 1).numpy())
    per_sequence = [
        reference.balance(s[b * LENGTH : (b + 1) * LENGTH], chosen[b * LENGTH : (b + 1) * LENGTH], 4, 2)
        for b in range(SEQUENCES)
    ]
    losses, _ = report_of(layer.config, layer(x, sequence_ids()), LENGTH)
    np.testing.assert_allclose([v.item() for v in losses], np.mean(per_sequence, axis=0), rtol=1e-5)


@pytest.mark.parametrize("dropping", [False, True])
def test_statistics_against_loops(dropping):
    layer = make_layer(balance=DROPPING if dropping else BalanceConfig()).train()
    x, ids = tokens(), sequence_ids()
    _, stats = report_of(layer.config, layer(x, ids), LENGTH)
    flat = x.flatten(0, 1).numpy()
    s, chosen = slow_routing(layer, flat)
    keep = slow_keep(layer, flat, ids.tolist()) if dropping else [[True] * 3 for _ in flat]
    load, dropped, sent = np.zeros(12), np.zeros(12), np.zeros(4)
    for t, experts in enumerate(chosen):
        for place, i in enumerate(experts):
            load[i] += 1
            dropped[i] += not keep[t][place]
        for d in range(4):
            sent[d] += any(i // 3 == d for i in experts)
    assert stats.tokens.item() == len(flat)
    assert stats.load_E[0].tolist() == load.tolist()
    assert stats.dropped_E[0].tolist() == dropped.tolist()
    assert stats.sent_G[0].tolist() == sent.tolist()
    np.testing.assert_allclose(stats.token_entropy.item(), -(s * np.log(s)).sum(), rtol=1e-6)
    np.testing.assert_allclose(stats.top1.item(), s.max(axis=1).sum(), rtol=1e-6)


def test_statistics_add_up_over_micro_batches():
    layer, x, ids = make_layer().eval(), tokens(), sequence_ids()
    _, whole = report_of(layer.config, layer(x, ids), LENGTH)
    parts = [
        report_of(layer.config, layer(x[b : b + 1], ids[b : b + 1]), LENGTH)[1] for b in range(SEQUENCES)
    ]
    total = parts[0].plus(parts[1]).plus(parts[2])
    for name, a, b in zip(RoutingStats._fields, total, whole, strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert not any(tensor.requires_grad for tensor in whole)


def test_routed_gradients_pass_through_affinity_and_experts():
    """Against the same sum written with one product an expert, all of them run on all tokens."""
    layer, x = make_layer(n_shared_experts=0), tokens()
    readout = torch.linspace(-1, 1, x.numel()).view_as(x).double()
    x.requires_grad_()
    (layer(x, sequence_ids()).y_BSD * readout).sum().backward()
    got = {name: p.grad.clone() for name, p in layer.named_parameters()} | {"x": x.grad.clone()}
    layer.zero_grad()
    x.grad = None

    u = x.flatten(0, 1)
    s = (u @ layer.gate.weight.T).softmax(dim=-1)
    _, chosen = slow_routing(layer, u.detach().numpy())
    y = torch.zeros_like(u)
    for i in range(12):
        gate, up = layer.experts.w13[i].chunk(2)
        ffn = (torch.nn.functional.silu(u @ gate.T) * (u @ up.T)) @ layer.experts.w2[i].T
        mine = torch.tensor([[float(i in experts)] for experts in chosen])
        y = y + 2.5 * mine * s[:, i : i + 1] * ffn
    (y.view_as(x) * readout).sum().backward()
    for name, p in [*layer.named_parameters(), ("x", x)]:
        torch.testing.assert_close(got[name], p.grad, atol=ATOL, rtol=1e-5, msg=name)
