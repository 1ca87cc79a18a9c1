"""Device-level token dropping against a slow loop of section 2.2.4."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv2.config.schema import BalanceConfig
from dsv2.moe.drop import exempt_sequences, keep_within_budget, kept_by_budget
from dsv2.parallel.mesh import ALONE
from tests.unit import reference
from tests.unit.helpers import properties

N_GROUP, LENGTH, TOP_K = 3, 4, 2


def random_population(sequences: int, seed: int, values: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Affinities of a few values (many ties) and skewed groups, both [sequences, LENGTH, TOP_K]."""
    rng = np.random.default_rng(seed)
    shape = (sequences, LENGTH, TOP_K)
    weights = rng.integers(1, values + 1, shape) / (values + 1)
    groups = rng.choice(N_GROUP, shape, p=[0.6, 0.3, 0.1])
    return torch.from_numpy(weights).float(), torch.from_numpy(groups)


def keep(weights_BSK, groups_BSK, ids_B, capacity=1.0, fraction=0.0, seed=0) -> torch.Tensor:
    """Return bool [B, S, K]."""
    kept_TK = keep_within_budget(
        weights_BSK.flatten(0, 1),
        groups_BSK.flatten(0, 1),
        ids_B,
        n_group=N_GROUP,
        balance=BalanceConfig(capacity_factor=capacity, exempt_fraction=fraction, exempt_seed=seed),
        ep=ALONE,
    )
    return kept_TK.view_as(weights_BSK)


@properties
@given(
    pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.booleans()), min_size=1, max_size=40),
    budget=st.integers(0, 15),
)
def test_budget_against_the_loop(pairs, budget):
    """Few values: most affinities are tied. 4 is an affinity of 1, the largest there is."""
    affinity, device, exempt = ([p[i] for p in pairs] for i in range(3))
    affinity = [a / 4 for a in affinity]
    mine = kept_by_budget(torch.tensor(affinity), torch.tensor(device), torch.tensor(exempt), 3, budget)
    assert mine.tolist() == reference.kept(affinity, device, exempt, 3, budget)


@properties
@given(
    sequences=st.integers(1, 6),
    capacity=st.sampled_from([0.3, 0.5, 1.0, 1.25, 2.0]),
    fraction=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_population_against_the_loop(sequences, capacity, fraction, seed):
    weights, groups = random_population(sequences, seed)
    ids = torch.arange(100 * seed, 100 * seed + sequences)
    kept = keep(weights, groups, ids, capacity, fraction)
    exempt = exempt_sequences(ids, fraction, 0).tolist()
    budget = int(capacity * sequences * LENGTH * TOP_K / N_GROUP)
    expected = reference.kept(
        weights.flatten().tolist(),
        groups.flatten().tolist(),
        [e for e in exempt for _ in range(LENGTH * TOP_K)],
        N_GROUP,
        budget,
    )
    assert kept.flatten().tolist() == expected
    assert kept[torch.tensor(exempt)].all(), "exempt sequences lose nothing"
    load = torch.bincount(groups[kept].flatten(), minlength=N_GROUP)
    exempt_load = torch.bincount(groups[torch.tensor(exempt)].flatten(), minlength=N_GROUP)
    assert (load <= exempt_load.clamp(min=budget)).all()


def test_all_tokens_to_one_device():
    """24 pairs, 3 devices, a budget of 8: the 8 of highest affinity stay."""
    weights = torch.rand(3, LENGTH, TOP_K, generator=torch.Generator().manual_seed(0))
    kept = keep(weights, torch.ones(3, LENGTH, TOP_K, dtype=torch.long), torch.arange(3))
    assert kept.sum() == 8
    assert weights[kept].min() > weights[~kept].max()


def test_balanced_loads_drop_nothing():
    groups = torch.arange(3 * LENGTH * TOP_K).view(3, LENGTH, TOP_K) % N_GROUP
    assert keep(torch.rand(3, LENGTH, TOP_K), groups, torch.arange(3)).all()


def test_exempt_pairs_fill_the_budget_first():
    """An exempt pair of affinity 0.1 takes the place of another of 0.9."""
    affinity = torch.tensor([0.9, 0.1, 0.8, 0.2])
    exempt = torch.tensor([False, True, False, True])
    device = torch.zeros(4, dtype=torch.long)
    assert kept_by_budget(affinity, device, exempt, 1, 3).tolist() == [True, True, False, True]
    assert kept_by_budget(affinity, device, exempt, 1, 1).tolist() == [False, True, False, True]


def test_of_equal_affinities_the_earlier_sequence_stays():
    """Earlier in the run's global order, wherever the sequence stands in the batch."""
    weights, groups = torch.full((3, LENGTH, TOP_K), 0.5), torch.zeros(3, LENGTH, TOP_K, dtype=torch.long)
    kept = keep(weights, groups, torch.tensor([30, 10, 20]))
    assert kept.sum(dim=(1, 2)).tolist() == [0, LENGTH * TOP_K, 0]


@properties
@given(seed=st.integers(0, 1000), fraction=st.sampled_from([0.0, 0.3]), data=st.data())
def test_order_within_the_population_is_irrelevant(seed, fraction, data):
    weights, groups = random_population(5, seed, values=3)
    ids = torch.tensor([3, 14, 15, 92, 65])
    order = torch.tensor(data.draw(st.permutations(range(5))))
    kept = keep(weights, groups, ids, fraction=fraction)
    shuffled = keep(weights[order], groups[order], ids[order], fraction=fraction)
    assert torch.equal(shuffled, kept[order])


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 10, 12345, 2**31, -1])
def test_about_a_tenth_is_exempt(seed):
    exempt = exempt_sequences(torch.arange(20_000), 0.1, seed).double()
    # Four standard deviations of a mean over 20000 coins, and over each 1000 in a row.
    assert abs(exempt.mean() - 0.1) < 4 * (0.1 * 0.9 / 20_000) ** 0.5
    assert (exempt.view(20, 1000).mean(dim=1) - 0.1).abs().max() < 4 * (0.1 * 0.9 / 1000) ** 0.5


def test_exemption_is_stable_and_belongs_to_the_sequence():
    ids = torch.arange(20_000)
    exempt = exempt_sequences(ids, 0.1, 0)
    # Part of what a resumed run must reproduce: a change here changes running trainings.
    assert exempt.nonzero().flatten()[:8].tolist() == [4, 23, 33, 40, 44, 50, 52, 60]
    order = torch.randperm(20_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(exempt_sequences(order, 0.1, 0), exempt[order])
    assert exempt[exempt_sequences(ids, 0.05, 0)].all(), "a larger fraction exempts more, not others"
    both = (exempt & exempt_sequences(ids, 0.1, 1)).double().mean()
    assert abs(both - 0.01) < 0.004, "another seed exempts others, independently"
    huge = exempt_sequences(ids + 2_000_000_000, 0.1, 0).double().mean()
    assert abs(huge - 0.1) < 4 * (0.1 * 0.9 / 20_000) ** 0.5, "V2 sees 2e9 sequences"


def test_exempt_fraction_limits():
    ids = torch.arange(1000)
    assert not exempt_sequences(ids, 0.0, 0).any()
    assert exempt_sequences(ids, 1.0, 0).all()
