"""The planner's traffic and times against enumeration, hand-made sums and the published cost."""

from dataclasses import replace
from itertools import combinations

import pytest

from data.config import DataConfig
from dsv2.config.schema import Config, OptimConfig, ParallelConfig, Precision, RuntimeConfig
from dsv2.model.sizes import flops_per_token
from dsv2.moe.reach import mean_ranks
from dsv2.parallel.gpus import GPUS, Gpu
from dsv2.parallel.plan import ParallelPlan
from dsv2.planner.parameters import rank_parameters
from dsv2.planner.speed import ARITHMETIC, LINKS, speed, traffic
from tests.unit.helpers import compose_config, tiny_config

V2 = compose_config("experiment=v2", "data.path=none")
SLOW = Gpu("H100", memory=1e9, node_bandwidth=4e6, network_bandwidth=1e6, capability=9)


def config(ep: int, stage: int = 1, recompute: bool = False) -> Config:
    """12 experts in 4 groups, 32 sequences of 16 tokens."""
    return Config(
        model=tiny_config(),
        data=DataConfig(sequence_length=16),
        optim=OptimConfig(batch_size=32),
        parallel=ParallelConfig(ep, stage),
        runtime=RuntimeConfig(micro_batch_size=2, precision=Precision.bf16, recompute=recompute),
    )


def enumerated(ep: int, limited: bool) -> float:
    """Ranks that 3 of 12 experts live on: the mean over all choices."""
    counts = []
    for open_groups in combinations(range(4), 2) if limited else [range(4)]:
        pool = [expert for group in open_groups for expert in range(3 * group, 3 * group + 3)]
        counts += [len({expert // (12 // ep) for expert in chosen}) for chosen in combinations(pool, 3)]
    return sum(counts) / len(counts)


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("ep", [1, 2, 4, 12])
def test_ranks_of_a_token_by_enumeration(ep, limited):
    assert mean_ranks(tiny_config(), ep, limited) == pytest.approx(enumerated(ep, limited), rel=1e-12)


def test_a_token_of_v2_reaches_at_most_its_limit():
    assert 2.7 < mean_ranks(V2.model, 8, limited=True) <= 3
    assert 4 < mean_ranks(V2.model, 8, limited=False) < 6


OUT = 20 * 2 + 2 * 3 * 4  # a row of 20 bf16 numbers, and ids and weights of 3 experts in fp32
# The result goes home. Its gradient goes out, and the gradients of row and weights go home.
ROW = OUT + 20 * 2 + 20 * 2 + (20 * 2 + 3 * 4)


@pytest.mark.parametrize(("recompute", "again"), [(False, 0), (True, OUT)])
def test_all_to_all_of_a_token(recompute, again):
    """In 2 MoE layers, to the ranks that hold any of its experts, 3 of 4 of them another than its own."""
    moved = traffic(config(4, recompute=recompute), gpus_per_node=2)
    row = 2 * (ROW + again)
    assert moved.ranks == pytest.approx(enumerated(4, True))
    assert moved.sent == pytest.approx(row * enumerated(4, True) * 3 / 4)
    assert moved.between_machines == pytest.approx(row * enumerated(4, True) * 2 / 4)
    assert moved.sent_unlimited == pytest.approx(row * enumerated(4, False) * 3 / 4)
    assert traffic(config(4), gpus_per_node=8).between_machines == 0
    assert traffic(config(1), gpus_per_node=8).sent == 0


def test_arithmetic_and_all_to_all_of_a_step():
    """4 ranks on 2 machines: a rank's 128 tokens, half of their rows between machines at the slower rate."""
    one = config(4)
    got = speed(one, 4, SLOW, gpus_per_node=2, mfu=None)
    flops = flops_per_token(one.model, 16)
    assert got.arithmetic_s == pytest.approx(128 * flops / (989e12 * ARITHMETIC))
    row = 2 * ROW * enumerated(4, True)
    assert got.all_to_all_s == pytest.approx(128 * max(row * 1 / 4 / 4e6, row * 2 / 4 / 1e6) / LINKS)
    assert got.step_s == pytest.approx(got.arithmetic_s + got.all_to_all_s + got.states_s)
    assert got.tokens_per_s == pytest.approx(512 / got.step_s)
    assert got.mfu == pytest.approx(got.tokens_per_s * flops / 4 / 989e12)


@pytest.mark.parametrize(
    ("stage", "moved"),
    [(1, 4 + 2), (2, 2 * (2 * 4 + 1)), (3, 2 * 3 * 4)],  # bytes; ZeRO-1 scatters sums in fp32
)
def test_gradients_and_weights_of_a_step(stage, moved):
    """4 micro-batches on 4 ranks of 2 machines, EP 2: dense tensors over both, experts over one a machine."""
    one = config(2, stage)
    held = rank_parameters(one.model, ParallelPlan(world=4, ep=2))
    dense = held.dense * 3 / 4 / min(4e6, 2 * 1e6)
    experts = held.experts.elements * 1 / 2 / 1e6
    got = speed(one, 4, SLOW, gpus_per_node=2, mfu=None)
    assert got.states_s == pytest.approx(moved * (dense + experts) / LINKS)


def test_one_machine_uses_its_own_links():
    got = speed(config(2, 1), 4, SLOW, gpus_per_node=4, mfu=None)
    held = rank_parameters(tiny_config(), ParallelPlan(world=4, ep=2))
    rows = held.dense * 3 / 4 + held.experts.elements / 2
    assert got.states_s == pytest.approx((4 + 2) * rows / 4e6 / LINKS)


def test_recomputing_runs_the_layers_forward_once_more():
    kept, recomputed = (
        speed(config(1, recompute=recompute), 1, SLOW, gpus_per_node=1, mfu=None)
        for recompute in (False, True)
    )
    flops = flops_per_token(tiny_config(), 16)
    layers = flops - 6 * 31 * 20  # all but the head's matrix
    assert recomputed.arithmetic_s / kept.arithmetic_s == pytest.approx((flops + layers / 3) / flops)


def test_published_cost_of_v2():
    """172.8K H800 hours per trillion tokens at about 25 %."""
    got = speed(V2, 128, GPUS["h800"], 8, mfu=0.25)
    assert got.gpu_hours_per_trillion == pytest.approx(172.8e3, rel=0.02)
    assert got.mfu == pytest.approx(0.25)
    assert got.days == pytest.approx(8.1 * 172.8e3 / 128 / 24, rel=0.02)


def test_an_mfu_given_takes_the_estimate_s_place():
    got = speed(config(4), 4, SLOW, gpus_per_node=2, mfu=0.1)
    assert got.step_s == pytest.approx(128 * flops_per_token(tiny_config(), 16) / (989e12 * 0.1))


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_a_peak(name):
    gpu = GPUS[name]
    assert gpu.peak > 3e14
    assert gpu.memory > gpu.node_bandwidth / 10 > gpu.network_bandwidth / 10


def test_more_gpus_take_less_time_a_step():
    steps = [speed(replace(V2), gpus, GPUS["h100"], 8, None).step_s for gpus in (64, 128, 256)]
    assert steps == sorted(steps, reverse=True)
