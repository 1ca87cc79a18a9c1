"""The layout changes nothing: losses, gradients, statistics and the dropped pairs of one global batch are the
same for every micro-batch, accumulation, number of ranks, EP, ZeRO stage and with layers recomputed.

The reference is plain torch in this process. Gradients are compared through Adam's first moment after
one step, which is 0.1 times the clipped gradient, and through the norm before clipping; see
`traces.assert_same` for the tolerances. Single layers, with routing as bad as it gets:
test_layer_invariance.py.
"""

from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dist import jobs, traces
from tests.unit.helpers import properties

STEPS = 4
QUICK = [  # the rest of the grid is below, under make test-all
    # world size, EP, ZeRO stage, micro-batch (the batch is 8: accumulation is 8 / world / micro-batch)
    (2, 1, 0, 4),
    (2, 2, 0, 2),
    (2, 2, 1, 2),
    (2, 2, 2, 1),
    (2, 2, 3, 2),
    (4, 1, 1, 1),
    (4, 2, 1, 2),
    (4, 4, 2, 2),
    (4, 2, 3, 1),
    (4, 4, 3, 2),
]
EVERY = [  # world size, EP, micro-batch
    *[(1, 1, m) for m in (1, 2, 4, 8)],
    *[(2, e, m) for e in (1, 2) for m in (1, 2, 4)],
    *[(4, e, m) for e in (1, 2, 4) for m in (1, 2)],
]


@pytest.mark.parametrize(("world_size", "ep", "stage", "micro_batch"), QUICK)
def test_layout_equals_one_process(train, world_size, ep, stage, micro_batch):
    got = train(world_size, STEPS, ep=ep, stage=stage, micro_batch=micro_batch)
    traces.assert_same(got, jobs.reference(STEPS))


@pytest.mark.parametrize("alpha", ["alpha_expert", "alpha_device", "alpha_comm"])
def test_every_balance_loss_has_a_part_in_the_routers_gradients(alpha):
    """Else a layout that scales it wrongly would not be seen."""
    with_it, without = jobs.reference(STEPS), jobs.reference(1, **{alpha: 0.0})
    for layer in (1, 2):
        name = f"model.layers.{layer}.mlp.gate.weight"
        assert traces.relative(without.first_moment[name], with_it.first_moment[name]) > 1e-2


@pytest.mark.parametrize(("world_size", "ep", "stage"), [(2, 2, 1), (4, 2, 3)])
def test_activation_checkpointing_changes_nothing(train, world_size, ep, stage):
    """Nothing is counted twice, either: `assert_same` compares every count."""
    got = train(world_size, STEPS, ep=ep, stage=stage, micro_batch=1, recompute=True)
    traces.assert_same(got, jobs.reference(STEPS))


DROPPING: dict[str, Any] = {"token_dropping": True, "capacity_factor": 0.8}


def population(ep: int, micro_batch: int) -> int:
    """Micro-batches of the one process that sees as many sequences together as one dispatch does."""
    return jobs.BATCH // (ep * micro_batch)


@pytest.mark.parametrize(
    ("world_size", "ep", "stage", "micro_batch", "recompute"),
    [
        # 4 sequences a dispatch (micro-batch x EP) on all of them: the population that dropping ranks
        (2, 1, 1, 4, False),
        (2, 2, 2, 2, False),
        (4, 2, 1, 2, True),
        (4, 4, 1, 1, False),
        (4, 4, 3, 1, False),
        # 2, and the whole batch
        (4, 2, 1, 1, False),
        (4, 4, 0, 2, True),
    ],
)
def test_dropping_equals_one_process_with_as_many_sequences_a_dispatch(
    train, world_size, ep, stage, micro_batch, recompute
):
    want = jobs.reference(STEPS, population(ep, micro_batch), **DROPPING)
    assert min(want.dropped) > 0, "the reference must drop something"
    layout = {"ep": ep, "stage": stage, "micro_batch": micro_batch, "recompute": recompute}
    got = train(world_size, STEPS, **layout, **DROPPING)
    assert len(got.kept) == 2 * jobs.BATCH * STEPS, "every layer decided on every sequence"
    traces.assert_same(got, want)


def test_dropping_ranks_over_the_whole_ep_group():
    """Ranking over a rank's own tokens would drop another set: the two references differ."""
    alone, together = (jobs.reference(STEPS, n, **DROPPING) for n in (4, 2))
    assert alone.losses[0] != pytest.approx(together.losses[0], rel=1e-6)


@pytest.mark.parametrize(("n_group", "topk_group", "ep"), [(1, 1, 2), (8, 3, 2), (2, 2, 4)])
def test_expert_groups_are_independent_of_the_layout(train, n_group, topk_group, ep):
    changes = {"n_group": n_group, "topk_group": topk_group}
    got = train(4, STEPS, ep=ep, stage=1, micro_batch=1, **changes)
    traces.assert_same(got, jobs.reference(STEPS, **changes))


class Setting(NamedTuple):
    world_size: int
    layout: dict[str, Any]
    model: dict[str, Any]
    length: int  # tokens a sequence
    tied: bool  # every affinity equal, so that most experts get nothing


@st.composite
def experts(draw) -> dict[str, int]:
    """Sizes of a mixture whose experts can be spread over 4 ranks."""
    n_group, size = draw(st.sampled_from([(1, 4), (1, 8), (2, 2), (2, 6), (4, 1), (4, 3), (8, 1), (8, 2)]))
    topk_group = draw(st.integers(1, n_group))
    return {
        "n_routed_experts": n_group * size,
        "n_group": n_group,
        "topk_group": topk_group,
        "num_experts_per_tok": draw(st.integers(1, min(5, topk_group * size))),
        "n_shared_experts": draw(st.integers(0, 2)),
    }


@st.composite
def random_settings(draw) -> Setting:
    world_size, ep, micro_batch = draw(st.sampled_from(EVERY))
    stage, recompute = draw(st.integers(0, 3)), draw(st.booleans())
    model = draw(experts()) | {"num_hidden_layers": draw(st.integers(2, 3))}
    if draw(st.booleans()):
        model |= {"token_dropping": True, "capacity_factor": draw(st.sampled_from([0.4, 0.8, 1.0]))}
        model |= {"exempt_fraction": draw(st.sampled_from([0.0, 0.25]))}
    layout = {"ep": ep, "micro_batch": micro_batch, "stage": stage, "recompute": recompute}
    return Setting(world_size, layout, model, draw(st.integers(2, 12)), draw(st.integers(0, 3)) == 0)


def check_setting(train, setting: Setting) -> None:
    layout, model = setting.layout, setting.model
    dropping = model.get("token_dropping", False)
    micro_batches = population(layout["ep"], layout["micro_batch"]) if dropping else 1
    batch = {"length": setting.length, "tied": setting.tied}
    want = jobs.reference(1, micro_batches, **batch, **model)
    got = train(setting.world_size, 1, **layout, **batch, **model)
    # With few tokens, the terms of a gradient nearly cancel and leave their rounding. On an AMD EPYC,
    # up to 1.4e-6 of a gradient was seen with 3 tokens. Commit 297f927 misses 1e-6 there too.
    traces.assert_same_step(got, want, floor=6e-8, rtol=4e-6)


@settings(properties, max_examples=25)
@given(setting=random_settings())
def test_a_random_model_on_a_random_layout(train, setting):
    check_setting(train, setting)


@pytest.mark.full
@pytest.mark.timeout(1800)
@settings(properties, max_examples=300)
@given(setting=random_settings())
def test_many_random_models_on_random_layouts(train, setting):
    check_setting(train, setting)


@pytest.mark.full
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world_size", "ep", "micro_batch"), EVERY)
def test_every_layout_equals_one_process(train, world_size, ep, micro_batch, stage, recompute):
    got = train(world_size, STEPS, ep=ep, stage=stage, micro_batch=micro_batch, recompute=recompute)
    traces.assert_same(got, jobs.reference(STEPS))


@pytest.mark.full
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world_size", "ep", "micro_batch"), EVERY)
def test_every_layout_drops_the_same(train, world_size, ep, micro_batch, stage, recompute):
    layout = {"ep": ep, "stage": stage, "micro_batch": micro_batch, "recompute": recompute}
    got = train(world_size, STEPS, **layout, **DROPPING)
    traces.assert_same(got, jobs.reference(STEPS, population(ep, micro_batch), **DROPPING))
