"""The order of sequences is a bijection, and a different one for every seed and epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.streams.order import permuted_index

seeds = st.integers(0, 2**40)


@settings(deadline=None)
@given(n=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 10_000))
def test_bijection(n: int, seed: int, epoch: int) -> None:
    assert sorted(permuted_index(np.arange(n), n, seed, epoch).tolist()) == list(range(n))


@settings(deadline=None)
@given(n=st.integers(1, 2**40), seed=seeds, data=st.data())
def test_each_position_is_looked_up_by_itself(n: int, seed: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    together = permuted_index(positions, n, seed, 3)
    assert together.dtype == np.int64
    assert ((together >= 0) & (together < n)).all()
    assert [int(permuted_index(np.array(p), n, seed, 3)) for p in positions] == together.tolist()
    assert len(set(together.tolist())) == len(set(positions.tolist()))


def test_shape_is_kept() -> None:
    positions = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(
        permuted_index(positions, 12, 0, 0).ravel(), permuted_index(positions.ravel(), 12, 0, 0)
    )
    assert permuted_index(np.arange(0), 12, 0, 0).shape == (0,)


def test_seeds_and_epochs_differ() -> None:
    n = 1000
    orders = [permuted_index(np.arange(n), n, seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.02  # 1 / n by chance


def test_looks_random() -> None:
    """No trace of the positions is left: neighbours land anywhere, and the two orders do not correlate."""
    n = 100_003
    order = permuted_index(np.arange(n), n, 7, 0)
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.02  # standard deviation 0.003
    distances = np.abs(np.diff(order)) / n
    assert distances.mean() == pytest.approx(1 / 3, abs=0.01)  # of two independent uniform numbers
    assert (np.diff(order) == 1).sum() < 10


def test_first_half_holds_half_of_every_region() -> None:
    n = 64_000
    first = permuted_index(np.arange(n // 2), n, 0, 0)
    counts = np.bincount(first // 1000, minlength=64)
    assert counts.min() > 400
    assert counts.max() < 600


def test_golden() -> None:
    """The order is part of what a checkpoint relies on: it must not change."""
    assert permuted_index(np.arange(8), 1000, 3, 5).tolist() == [588, 680, 87, 900, 796, 892, 904, 274]


@pytest.mark.parametrize(("position", "n"), [(-1, 5), (5, 5), (0, 0)])
def test_outside(position: int, n: int) -> None:
    with pytest.raises(ValueError, match=r"positions must lie in|n must be at least 1"):
        permuted_index(np.array([position]), n, 0, 0)
