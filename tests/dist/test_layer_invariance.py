"""A single MoE layer whose routing is as bad as it gets, on every layout: ties, empty experts, all tokens to
one expert, with and without dropping.

Tokens and centroids are small multiples of 1/16, so a logit is exact in fp32 and an affinity has the same
bits wherever its token lies: what is tied is tied on every layout, and no choice hangs on rounding.

Shapes: B sequences, S tokens a sequence, D hidden_size, E experts, K experts a token.
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv2.moe.drop import exempt_sequences
from tests.dist import jobs, layer_jobs
from tests.dist.layer_jobs import BATCH, Case, Outcome
from tests.dist.test_invariance import experts
from tests.dist.traces import assert_same_routing
from tests.unit import reference
from tests.unit.helpers import properties

WIDTH = 6
LAYOUTS = {2: [(1, 1), (1, 2), (2, 1), (2, 2)], 4: [(1, 1), (2, 1), (4, 1)]}  # world: EP, micro-batch


def few(rng: np.random.Generator, distinct: int, count: int, unit: float) -> np.ndarray:
    """[count, WIDTH]: `distinct` vectors of multiples of `unit`, repeated; 0: no two need be equal."""
    vectors = rng.integers(-8, 9, (distinct or count, WIDTH)).astype(np.float32) * unit
    return vectors[rng.integers(0, distinct, count)] if distinct else vectors


def make_case(sizes: dict[str, int], length: int, dropping: bool, seed: int, **fixed: Any) -> Case:
    """What is not `fixed` comes from the seed, and so is spread evenly.

    The first feature of every token is 1, so that a centroid's first feature is a bias of its logit.
    """
    rng = np.random.default_rng(seed)

    def choose(name: str, options: list[Any]) -> Any:
        drawn = options[rng.integers(len(options))]
        return fixed.get(name, drawn)

    x = few(rng, choose("different_tokens", [0, 0, 1, 2]), BATCH * length, 1 / 16)
    gate = few(rng, choose("different_centroids", [0, 0, 1, 2]), sizes["n_routed_experts"], 1 / 8)
    x[:, 0], gate[:, 0] = 1.0, 0.0
    bias = choose("bias", ["none", "favourite", "shunned"])
    if bias == "favourite":
        gate[rng.integers(len(gate)), 0] = 3.0
    elif bias == "shunned":
        gate[rng.random(len(gate)) < 0.6, 0] = -3.0
    config = jobs.model_config(
        **sizes,
        hidden_size=WIDTH,
        moe_intermediate_size=5,
        token_dropping=dropping,
        capacity_factor=choose("capacity_factor", [0.3, 0.6, 1.0]),
        exempt_fraction=choose("exempt_fraction", [0.0, 0.0, 0.3, 1.0]),
    )
    start = choose("start", [0, 21, 2_000_000_000])
    order = fixed.get("order", rng.permutation(BATCH).tolist())
    return Case(
        config=config,
        x_BSD=x.reshape(BATCH, length, WIDTH),
        gate_ED=gate,
        ids=list(range(start, start + BATCH)),
        order=order,
        recompute=choose("recompute", [False, True]),
    )


cases = st.builds(
    make_case,
    sizes=experts(),
    length=st.integers(1, 5),
    dropping=st.sampled_from([False, True, True]),
    seed=st.integers(0, 2**32 - 1),
)
SIZES = {
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
}
# Everything tied: which pairs stay is the ids' order alone, against which the sequences stand.
ALL_TIED = make_case(
    SIZES, 3, True, 0, different_tokens=1, different_centroids=1, bias="none",
    capacity_factor=0.6, exempt_fraction=0.0, order=[3, 1, 2, 0],
)  # fmt: skip
# One expert, and so one rank, gets all tokens; nearly all of them are dropped.
ONE_EXPERT = make_case(
    SIZES | {"num_experts_per_tok": 1, "n_shared_experts": 0}, 5, True, 0, different_tokens=0,
    different_centroids=0, bias="favourite", capacity_factor=0.3, exempt_fraction=0.3,
)  # fmt: skip


class Choice(NamedTuple):
    """The slow loops' routing, by sequence and token."""

    affinity: np.ndarray  # [B, S, E]
    experts: list[list[list[int]]]  # [B][S][K]
    keep: list[list[list[bool]]]  # [B][S][K]


def slow_choice(case: Case, population: int) -> Choice:
    """Sections 2.2.2 and 2.2.4, of `population` sequences a dispatch."""
    config = case.config
    limits = (config.num_experts_per_tok, config.n_group, config.topk_group)
    affinity = np.array(
        [[reference.affinities(u, case.gate_ED) for u in row] for row in case.x_BSD.astype(float)]
    )
    chosen = [[reference.select(list(s), *limits) for s in row] for row in affinity]
    keep = [[[True] * len(ids) for ids in row] for row in chosen]
    if config.balance.token_dropping:
        exempt = exempt_sequences(torch.tensor(case.ids), config.balance.exempt_fraction, 0).tolist()
        size = config.n_routed_experts // config.n_group
        for first in range(0, BATCH, population):
            sequences = sorted(case.order[first : first + population])
            pairs = [(b, t, k) for b in sequences for t, k in np.ndindex(len(chosen[b]), limits[0])]
            stays = reference.kept(
                [affinity[b, t, chosen[b][t][k]] for b, t, k in pairs],
                [chosen[b][t][k] // size for b, t, k in pairs],
                [exempt[b] for b, _, _ in pairs],
                config.n_group,
                int(config.balance.capacity_factor * len(pairs) / config.n_group),
            )
            for (b, t, k), stay in zip(pairs, stays, strict=True):
                keep[b][t][k] = stay
    return Choice(affinity, chosen, keep)


def assert_follows_the_paper(got: Outcome, case: Case, choice: Choice) -> None:
    """Output, losses, counts and kept pairs of the loops."""
    config = case.config
    limits = (config.num_experts_per_tok, config.n_group, config.topk_group)
    weights = reference.weights_of(layer_jobs.build_layer(case))
    y = [
        reference.moe(x.astype(float), weights, *limits, config.routed_scaling_factor, keep)
        for x, keep in zip(case.x_BSD, choice.keep, strict=True)
    ]
    np.testing.assert_allclose(got.y_BSD, y, rtol=1e-5, atol=1e-5)
    losses = [
        reference.balance(s, ids, config.n_group, config.topk_group)
        for s, ids in zip(choice.affinity, choice.experts, strict=True)
    ]
    np.testing.assert_allclose(got.losses, np.mean(losses, axis=0), rtol=1e-6)
    load, dropped = np.zeros((2, config.n_routed_experts))
    for place in np.ndindex(np.shape(choice.keep)):
        b, t, k = place
        load[choice.experts[b][t][k]] += 1
        dropped[choice.experts[b][t][k]] += not choice.keep[b][t][k]
    assert got.routing["load_E"].tolist() == load.tolist()
    assert got.routing["dropped_E"].tolist() == dropped.tolist()
    if config.balance.token_dropping:
        assert {place: keep.tolist() for place, keep in got.kept.items()} == {
            (0, case.ids[b]): keep for b, keep in enumerate(choice.keep)
        }


def assert_same(got: Outcome, want: Outcome) -> None:
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-6)
    assert_same_routing(got.routing, want.routing, rtol=1e-6)
    assert got.kept.keys() == want.kept.keys()
    for place, keep in want.kept.items():
        np.testing.assert_array_equal(got.kept[place], keep, err_msg=str(place))
    # Where nearly all affinity is one expert's, the router's gradient is what is left of terms that cancel.
    floor = 3e-8 * np.linalg.norm([np.linalg.norm(grad) for grad in want.grads.values()])
    for name, theirs in {"y": want.y_BSD, **want.grads}.items():
        mine = got.y_BSD if name == "y" else got.grads[name]
        assert np.linalg.norm(mine - theirs) <= 1e-6 * np.linalg.norm(theirs) + floor, name


def rows_between_ranks(case: Case, choice: Choice, ep: int, micro_batch: int, world_size: int) -> int:
    """Distinct (token, other rank of its EP group that holds a kept expert of it)."""
    here = case.config.n_routed_experts // ep
    rows = 0
    for place, b in enumerate(case.order):
        own = place // micro_batch % world_size % ep
        for ids, keep in zip(choice.experts[b], choice.keep[b], strict=True):
            rows += len({i // here for i, kept in zip(ids, keep, strict=True) if kept} - {own})
    return rows


def check_case(pools, case: Case) -> set[str]:
    """All layouts against one process, that against the loops; what the case is an example of."""
    dropping = case.config.balance.token_dropping
    choice = {n: slow_choice(case, n) for n in (1, 2, 4)}
    alone = {n: layer_jobs.share(case, layer_jobs.build_layer(case), 0, 1, n) for n in (1, 2, 4)}
    for n in alone:
        assert_follows_the_paper(alone[n], case, choice[n])
    for world_size, layouts in LAYOUTS.items():
        ranks = pools[world_size].run("tests.dist.layer_jobs:shares", case=case, layouts=layouts)
        for (ep, micro_batch), parts in zip(layouts, zip(*ranks, strict=True), strict=True):
            got, n = layer_jobs.together(parts), ep * micro_batch
            assert_same(got, alone[n if dropping else BATCH])
            assert got.rows_out == rows_between_ranks(case, choice[n], ep, micro_batch, world_size)
    return traits(case, choice[BATCH], alone)


def flat(x: np.ndarray) -> np.ndarray:
    """[B * S, ...]"""
    return x.reshape(-1, x.shape[-1])


def traits(case: Case, choice: Choice, alone: dict[int, Outcome]) -> set[str]:
    load, n_tokens = alone[BATCH].routing["load_E"], case.x_BSD.shape[0] * case.x_BSD.shape[1]
    found = set()
    if (load == 0).any():
        found.add("an expert without a token")
    if load.max() == n_tokens:
        found.add("all tokens to one expert")
    if (load > 0).sum() == case.config.num_experts_per_tok:
        found.add("all tokens to the same experts")
    for s, ids in zip(flat(choice.affinity), flat(np.array(choice.experts)), strict=True):
        if set(s[ids]) & set(np.delete(s, ids)):
            found.add("a chosen expert tied with another")
    if any(len(keep) and not keep.all() for keep in alone[BATCH].kept.values()):
        found.add("dropped pairs")
        if tied_across_sequences(case, choice):
            found.add("equal pairs kept against the order in the batch")
        if not all(np.array_equal(alone[1].kept[place], keep) for place, keep in alone[BATCH].kept.items()):
            found.add("other pairs dropped in another population")
    return found


def tied_across_sequences(case: Case, choice: Choice) -> bool:
    """Is a pair kept, and an equal one of its group dropped whose sequence stands ahead with a higher id?"""
    size, place = case.config.n_routed_experts // case.config.n_group, np.argsort(case.order)
    kept, dropped = set(), set()
    for b, t, k in np.ndindex(np.shape(choice.keep)):
        expert = choice.experts[b][t][k]
        pair = (choice.affinity[b, t, expert], expert // size, b)
        (kept if choice.keep[b][t][k] else dropped).add(pair)
    return any(
        (s, group) == (s2, group2) and b < b2 and place[b] > place[b2]
        for s, group, b in kept
        for s2, group2, b2 in dropped
    )


TRAITS = {
    "an expert without a token",
    "all tokens to one expert",
    "all tokens to the same experts",
    "a chosen expert tied with another",
    "dropped pairs",
    "equal pairs kept against the order in the batch",
    "other pairs dropped in another population",
}


def check_cases(pools, max_examples: int) -> None:
    seen: Counter[str] = Counter()

    @settings(properties, max_examples=max_examples)
    @given(case=cases)
    @example(case=ALL_TIED)
    @example(case=ONE_EXPERT)
    def check(case: Case) -> None:
        seen.update(check_case(pools, case))

    check()
    assert seen.keys() == TRAITS, f"the examples show too little: {seen}"


def test_a_layer_on_every_layout(pools):
    check_cases(pools, max_examples=40)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_many_layers_on_every_layout(pools):
    check_cases(pools, max_examples=400)
