"""The planner's bytes against real engines on 1, 2 and 4 ranks: what they hold, and the most they need.

The vocabulary is wide enough, and without expert parallelism the experts too, for tensors above ZeRO-3's
threshold of 1e5 elements, and the rest lie below it.
"""

import itertools
from typing import Any

import pytest

from data.config import DataConfig
from dsv2.config.schema import Config, OptimConfig, ParallelConfig, Precision, RuntimeConfig
from dsv2.model.head_memory import head
from dsv2.moe.routers.kinds import router_of
from dsv2.parallel.micro_batch import micro_batch
from dsv2.parallel.zero.base import BUCKET
from dsv2.planner.activations import activations
from dsv2.planner.memory import Memory, memory
from tests.dist import jobs

SIZES = {"vocab_size": 2100, "hidden_size": 48, "moe_intermediate_size": 200}
# Beyond the states a rank holds Adam's step counters, its last norm and, here, the test's batch.
SLACK = 1100  # bytes


def planned(
    world_size: int,
    ep: int,
    stage: int,
    bf16: bool,
    states: Precision = Precision.fp32,
    batch: int = 16,
    micro_batch: int = 1,
) -> Memory:
    config = Config(
        model=jobs.model_config(**SIZES),
        data=DataConfig(sequence_length=jobs.SEQUENCE),
        optim=OptimConfig(batch_size=batch, states=states),
        parallel=ParallelConfig(expert_parallel_size=ep, zero_stage=stage),
        runtime=RuntimeConfig(
            micro_batch_size=micro_batch, precision=Precision.bf16 if bf16 else Precision.fp32
        ),
    )
    return memory(config, world_size, gpu=False)


KINDS = [(0, False), (1, False), (1, True), (2, False), (2, True), (3, False), (3, True)]
GRID = [(world, ep) for world in (1, 2, 4) for ep in (1, 2, 4) if world % ep == 0]
# Each kind once, as trained: bf16 on four ranks, fp32 on one.
CHOSEN = [(4, 2, 0, False), *((4, 2, stage, True) for stage in (1, 2, 3))]
CHOSEN += [(1, 1, stage, False) for stage in (1, 2, 3)]
CASES = [
    pytest.param(world, ep, stage, bf16, marks=[] if (world, ep, stage, bf16) in CHOSEN else pytest.mark.full)
    for (world, ep), (stage, bf16) in itertools.product(GRID, KINDS)
]


@pytest.mark.parametrize(("world_size", "ep", "stage", "bf16"), CASES)
def test_states_and_peak_are_those_of_the_engine(pools, world_size, ep, stage, bf16):
    layout: dict[str, Any] = {"ep": ep, "stage": stage, "micro_batch": 1, "bf16": bf16}
    want = planned(world_size, ep, stage, bf16)
    bucket = 0
    if stage >= 2 or (stage == 1 and not bf16):
        bucket = BUCKET * (2 if bf16 else 4)  # it would drown all else
    for held, peak, saved in pools[world_size].run(
        "tests.dist.memory_jobs:measure", micro_batches=2, **layout, **SIZES
    ):
        assert 0.99 < saved / want.saved <= 1, "the plan counts padding"
        assert 0 <= held - want.states.total <= SLACK
        # The planner stays on the safe side where it does not follow every copy (ZeRO-2 and 3). For ZeRO-1 in
        # bf16 it counts the head's gradient, 3 % of the peak here, together with the fullest layer.
        low, high = (0.99, 1.06) if stage == 1 and bf16 else (0.95, 1.22)
        assert low < (want.peak - bucket) / (peak - bucket) < high, want.phases


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("states", list(Precision))
def test_bf16_states_and_gradients_of_one_term(pools, states, micro_batches):
    """Under ZeRO-1 in bf16: masters go with bf16 states, fp32 sums with the second micro-batch."""
    want = planned(1, 1, 1, True, states, micro_batches)
    [(held, peak, saved)] = pools[1].run(
        "tests.dist.memory_jobs:measure",
        micro_batches=micro_batches,
        **{"ep": 1, "stage": 1, "micro_batch": 1, "bf16": True, "states": states},
        **SIZES,
    )
    assert saved == pytest.approx(want.saved, abs=16)
    assert 0 <= held - want.states.total <= SLACK
    assert 0.97 < want.peak / peak < 1.05, want.phases


def test_gradients_of_one_term_come_as_activations_go(pools):
    """The fullest moment of a step whose activations are the most of it: the head's, before any gradient."""
    want = planned(1, 1, 1, True, Precision.fp32, jobs.BATCH, jobs.BATCH)
    assert want.peak_phase == "forward and backward"
    [(_, peak, _)] = pools[1].run(
        "tests.dist.memory_jobs:measure",
        micro_batches=1,
        **{"ep": 1, "stage": 1, "micro_batch": jobs.BATCH, "bf16": True},
        **SIZES,
    )
    assert 0.97 < want.peak / peak < 1.05, want.phases


# One expert a token on one of four ranks: then the reference's way home takes the most.
ONE_EXPERT = {"num_experts_per_tok": 1, "topk_group": 1}
KERNELS = [
    ("reference", Precision.fp32),
    ("reference", Precision.bf16),
    ("fused", Precision.bf16),
    ("fused_cute", Precision.bf16),
]


@pytest.mark.parametrize(("kernels", "precision"), KERNELS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {}),
        pytest.param(4, {}, marks=pytest.mark.full),
        pytest.param(4, ONE_EXPERT, marks=pytest.mark.full),
    ],
)
def test_experts_elsewhere(pools, world_size, changes, recompute, kernels, precision):
    """What ranks that share the experts keep of a forward, and their fullest moment, against the tables."""
    # With one MoE layer a rank's fullest moment grows with its rows, and the ranks' mean is the balanced one.
    sizes = {
        "v_head_dim": 12,
        "hidden_size": 64,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
    } | changes
    runtime = RuntimeConfig(
        recompute=recompute,
        precision=precision,
        micro_batch_size=jobs.BATCH // world_size,
        kernels=kernels,
    )
    done = pools[world_size].run(
        "tests.dist.memory_jobs:one_pass", sizes=sizes, sequences=runtime.micro_batch_size, runtime=runtime
    )
    kept, peak = (sum(values) / world_size for values in zip(*done, strict=True))
    config = Config(
        model=jobs.model_config(**sizes),
        data=DataConfig(sequence_length=jobs.SEQUENCE),
        parallel=ParallelConfig(expert_parallel_size=world_size),
        runtime=runtime,
    )
    ranks_per_token = router_of(config.model).mean_ranks(config.model, world_size)
    p = micro_batch(config, ranks_per_token, fused_norm=False)
    want = activations(p)
    assert want.kept + sum(head(p).values()) == pytest.approx(kept, rel=0.02)
    # Where two moments are nearly as full, uneven ranks have theirs at either, and the mean of the fuller
    # ones lies above both means: seen on 4 ranks with plain torch.
    low = 0.95 if world_size == 4 and kernels == "reference" else 0.97
    assert low < want.peak / peak < 1.08
