"""The slowest rank, compared with the others."""

import pytest

from dsv2.monitoring.metrics.base import RankTimes
from dsv2.monitoring.metrics.ranks import MOST, rank_values


def test_the_slowest_rank_by_its_own_time():
    """Rank 1 computes slowly; rank 2 waits for its data, and more: steps take equally long everywhere."""
    times = [
        RankTimes(0.1, 0.0, 2.0),
        RankTimes(0.4, 0.1, 2.0),
        RankTimes(0.1, 0.9, 2.0),
        RankTimes(0.2, 0.0, 2.0),
    ]
    assert rank_values(times) == {
        "ranks/slow": pytest.approx(1.0 / 0.2),
        "ranks/slowest": 2,
        **{"work/R0": 0.1, "work/R1": 0.4, "work/R2": 0.1, "work/R3": 0.2},
        **{"data/R0": 0.0, "data/R1": 0.1, "data/R2": 0.9, "data/R3": 0.0},
        **{f"step/R{rank}": 2.0 for rank in range(4)},
    }


def test_of_two_ranks_one_is_compared_with_the_other():
    assert rank_values([RankTimes(3.0), RankTimes(1.0)])["ranks/slow"] == 3


def test_many_ranks_have_no_metrics_of_their_own():
    times = [RankTimes(1.0)] * MOST + [RankTimes(2.0)]
    assert rank_values(times) == {"ranks/slow": 2, "ranks/slowest": MOST}
    assert "work/R63" in rank_values(times[1:])
