"""Where each rank's rows begin, here and at their targets."""

import numpy as np
import torch

from dsv2.moe.transport import Route


def test_segments_of_every_rank_fit_together():
    """Each row that a rank sends has a place of its own at its target, in the order of the senders."""
    counts = np.random.default_rng(0).integers(0, 5, (3, 3))
    routes = [Route(torch.from_numpy(counts), rank) for rank in range(3)]
    for home in (False, True):
        moved = counts.T if home else counts
        taken: dict[int, list[int]] = {target: [] for target in range(3)}
        for rank, route in enumerate(routes):
            first, number, place = route.segments()[int(home)].tolist()
            assert number == moved[rank].tolist()
            assert first == [sum(moved[rank][:target]) for target in range(3)]
            assert place == [sum(moved[:rank, target]) for target in range(3)]
            for target in range(3):
                taken[target] += range(place[target], place[target] + number[target])
        for target, places in taken.items():
            assert places == list(range(moved[:, target].sum()))
