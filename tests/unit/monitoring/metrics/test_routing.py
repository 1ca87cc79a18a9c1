"""The routing family: values of a window against loops over layers and experts."""

import math

import numpy as np
import pytest
import torch

from dsv2.kernels.reference.router import sequence_sums
from dsv2.kernels.types import Choice
from dsv2.moe.stats import LayerRouting, RoutingStats, routing_stats, stack_sums
from dsv2.monitoring.metrics.routing import routing_maps, routing_values
from tests.unit.helpers import tiny_config

LAYERS, EXPERTS, GROUPS = 3, 12, 4
CONFIG = tiny_config(first_k_dense_replace=2, num_hidden_layers=5)


def random_stats() -> RoutingStats:
    """Two layers with dead experts; layers have seen different numbers of tokens, to catch a mixed mean."""
    rng = np.random.default_rng(0)
    load = rng.integers(1, 50, (LAYERS, EXPERTS)).astype(float)
    load[0, 3] = load[2, 5] = load[2, 7] = 0
    tensors = {
        "tokens": load.sum(axis=1) / 3,
        "load_E": load,
        "dropped_E": np.floor(load * rng.random((LAYERS, EXPERTS))),
        "sent_G": rng.integers(10, 60, (LAYERS, GROUPS)).astype(float),
        "token_entropy": rng.random(LAYERS) * 100,
        "top1": rng.random(LAYERS) * 30,
        "rows_out": rng.integers(1, 9, LAYERS).astype(float),
        "rows_in": rng.integers(1, 9, LAYERS).astype(float),
    }
    return RoutingStats(**{name: torch.from_numpy(value) for name, value in tensors.items()})


def slow_metrics(stats: RoutingStats) -> dict[str, float]:
    metrics: dict[str, float] = {}
    vio, devices, recv = [], [], []
    for layer in range(LAYERS):
        load = stats.load_E[layer].tolist()
        name = f"L{layer + 2:02d}"  # two dense layers come first
        metrics[f"vio/{name}"] = max(load) / (sum(load) / EXPERTS) - 1
        metrics[f"dead/{name}"] = load.count(0)
        metrics[f"drop/{name}"] = sum(stats.dropped_E[layer].tolist()) / sum(load)
        vio.append(metrics[f"vio/{name}"])
        devices.append([sum(load[3 * d : 3 * d + 3]) for d in range(GROUPS)])
        sent = stats.sent_G[layer].tolist()
        recv.append(max(sent) / (sum(sent) / GROUPS))
    shares = [[x / sum(load) for x in load] for load in stats.load_E.tolist()]
    entropy = [-sum(p * math.log(p) for p in row if p > 0) for row in shares]
    tokens = stats.tokens.tolist()
    metrics |= {
        "moe/max_vio": np.mean(vio),
        "moe/max_vio_max": max(vio),
        "moe/dead": 3,
        "moe/ent_tok": np.mean([h / n for h, n in zip(stats.token_entropy.tolist(), tokens, strict=True)])
        / math.log(EXPERTS),
        "moe/ent_load": np.mean(entropy) / math.log(EXPERTS),
        "moe/top1": np.mean([s / n for s, n in zip(stats.top1.tolist(), tokens, strict=True)]),
        "moe/drop": sum(map(sum, stats.dropped_E.tolist())) / sum(map(sum, stats.load_E.tolist())),
        "dev/load_max_mean": np.mean([max(row) / np.mean(row) for row in devices]),
        "dev/cv": np.mean([np.std(row) / np.mean(row) for row in devices]),
        "comm/recv_max_mean": np.mean(recv),
        "comm/devs_per_tok": np.mean(
            [sum(s) / n for s, n in zip(stats.sent_G.tolist(), tokens, strict=True)]
        ),
    }
    return metrics


def test_routing_metrics_against_loops():
    stats = random_stats()
    values = routing_values(stats, CONFIG)
    want = slow_metrics(stats)
    assert {name: values[name] for name in want} == pytest.approx(want, rel=1e-12)


def stats_of(choice: Choice, n_group: int, layers: int = 1) -> RoutingStats:
    """Of one sequence, nothing dropped, the same in each layer."""
    sums = sequence_sums(choice, 1, n_group)
    routing = [LayerRouting(sums, sums.selected_BE.sum(dim=0).long(), 0, 0)] * layers
    return routing_stats(routing, stack_sums(routing), len(choice.affinity_TE))


def test_balanced_routing():
    """Every token's affinity is uniform, every expert equally loaded, every token reaches two groups."""
    groups = [(0, 1), (1, 2), (2, 3), (3, 0)]
    ids = torch.tensor([[3 * a + e, 3 * b + e] for a, b in groups for e in range(3)])
    affinity = torch.full((12, 12), 1 / 12)
    stats = stats_of(Choice(ids, affinity.gather(1, ids), affinity), GROUPS, layers=2)
    metrics = routing_values(stats, CONFIG)
    want = {
        "moe/max_vio": 0, "moe/max_vio_max": 0, "moe/dead": 0, "moe/drop": 0, "dev/cv": 0,
        "moe/ent_tok": 1, "moe/ent_load": 1, "moe/top1": 1 / 12,
        "dev/load_max_mean": 1, "comm/recv_max_mean": 1, "comm/devs_per_tok": 2,
        "vio/L02": 0, "vio/L03": 0, "dead/L02": 0, "dead/L03": 0, "drop/L02": 0, "drop/L03": 0,
    }  # fmt: skip
    # ln 12 in fp32 and back: 1e-6.
    assert {name: metrics[name] for name in want} == pytest.approx(want, abs=1e-6)


def test_a_dead_expert_has_no_weight_in_the_entropy():
    """Half of the experts share the load evenly: ln 6 / ln 12, not a NaN from 0 ln 0."""
    load = torch.tensor([[5.0, 0.0] * 6], dtype=torch.float64)
    stats = random_stats()
    first = RoutingStats(*(tensor[:1] for tensor in stats))._replace(load_E=load)
    metrics = routing_values(first, CONFIG)
    assert metrics["moe/ent_load"] == pytest.approx(math.log(6) / math.log(12))
    assert metrics["moe/dead"] == metrics["dead/L02"] == 6


def test_entropy_of_an_affinity_that_underflowed():
    affinity = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    ids = torch.tensor([[0], [0]])
    stats = stats_of(Choice(ids, affinity.gather(1, ids), affinity), 1)
    assert stats.token_entropy.item() == pytest.approx(math.log(2))
    assert stats.top1.item() == 1.5


def test_plus():
    a, b = random_stats(), random_stats()
    total = a.plus(b)
    for name, x, y in zip(RoutingStats._fields, total, a, strict=True):
        assert torch.equal(x, 2 * y), name


def test_maps_show_loads_over_the_uniform_load():
    stats = random_stats()
    maps = routing_maps(stats, CONFIG)
    assert maps.keys() == {"map/expert_load", "map/dev_load", "map/dev_recv"}
    for layer in range(LAYERS):
        load, sent = stats.load_E[layer].tolist(), stats.sent_G[layer].tolist()
        for expert in range(EXPERTS):
            want = load[expert] * EXPERTS / sum(load)
            assert maps["map/expert_load"][layer, expert] == pytest.approx(want)
        for group in range(GROUPS):
            want = sum(load[group * 3 : group * 3 + 3]) * GROUPS / sum(load)
            assert maps["map/dev_load"][layer, group] == pytest.approx(want)
            assert maps["map/dev_recv"][layer, group] == pytest.approx(sent[group] * GROUPS / sum(sent))
