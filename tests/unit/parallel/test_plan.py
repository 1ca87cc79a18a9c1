"""The layout's dimensions, for every size that divides."""

import pytest

from dsv2.config.schema import ParallelConfig, Precision, RuntimeConfig
from dsv2.parallel.plan import Dim, ParallelPlan

PLANS = [
    ParallelPlan(world=pp * ep * edp, ep=ep, pp=pp)
    for pp in (1, 2, 3)
    for ep in (1, 2, 4)
    for edp in (1, 2, 3)
]


def test_two_stages_of_four_ranks_by_hand():
    plan = ParallelPlan(world=8, ep=2, pp=2)
    assert plan.sizes == {Dim.world: 8, Dim.pp: 2, Dim.dp: 4, Dim.ep: 2, Dim.edp: 2}
    assert [plan.coordinate(rank, Dim.pp) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [plan.coordinate(rank, Dim.dp) for rank in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [plan.coordinate(rank, Dim.ep) for rank in range(8)] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [plan.coordinate(rank, Dim.edp) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert plan.members(6, Dim.pp) == [2, 6]
    assert plan.members(6, Dim.dp) == [4, 5, 6, 7]
    assert plan.members(6, Dim.ep) == [6, 7], "neighbours, so inside a machine"
    assert plan.members(6, Dim.edp) == [4, 6]
    assert plan.members(6, Dim.world) == list(range(8))


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_members_differ_in_their_own_coordinate_only(plan):
    coordinates = [
        {dim: plan.coordinate(rank, dim) for dim in (Dim.pp, Dim.edp, Dim.ep)} for rank in range(plan.world)
    ]
    assert len({tuple(c.values()) for c in coordinates}) == plan.world, "pp, edp and ep tell ranks apart"
    for rank in range(plan.world):
        for dim in Dim:
            members = plan.members(rank, dim)
            assert len(members) == plan.sizes[dim]
            assert [plan.coordinate(member, dim) for member in members] == list(range(len(members)))
            assert members[plan.coordinate(rank, dim)] == rank
        for dim in (Dim.pp, Dim.edp, Dim.ep):
            for member in plan.members(rank, dim):
                assert coordinates[member] | {dim: 0} == coordinates[rank] | {dim: 0}
        assert {coordinates[m][Dim.pp] for m in plan.members(rank, Dim.dp)} == {coordinates[rank][Dim.pp]}


def test_the_plan_of_a_configuration_and_its_words():
    parallel = ParallelConfig(expert_parallel_size=2, zero_stage=1)
    plan = ParallelPlan.of(parallel, 4)
    assert plan == ParallelPlan(world=4, ep=2, pp=1)
    runtime = RuntimeConfig(precision=Precision.fp32)
    assert plan.text("cpu", parallel, runtime) == "4 x cpu, expert parallel 2, ZeRO-1, fp32"
