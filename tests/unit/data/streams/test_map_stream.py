"""The stream over a prepared folder: every sequence once per epoch."""

from pathlib import Path

import numpy as np
import pytest

from data.errors import UserError
from data.prepared.packing import open_split
from data.streams.map_stream import MapStream
from tests.unit.data.streams.helpers import (
    COUNT,
    LENGTH,
    SEED,
    build,
    local,
    stream_order,
)


def test_map_stream_epochs(folder: Path) -> None:
    """Every epoch has each sequence once, in an order of its own."""
    packed = open_split(folder / "prepared", "train", LENGTH, 300)
    n = len(packed)
    assert 2 * n < COUNT
    order = stream_order(build(local(folder)), 3 * n)
    epochs = [order[epoch * n : (epoch + 1) * n] for epoch in range(3)]
    everything = sorted(packed.take(np.arange(n)).tolist())
    assert [sorted(epoch) for epoch in epochs] == [everything] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert stream_order(build(local(folder, seed=SEED + 1)), n) != epochs[0]


def test_bad_token_is_refused(folder: Path) -> None:
    packed = open_split(folder / "prepared", "train", LENGTH, 10)
    with pytest.raises(UserError, match=r"model\.vocab_size=10"):
        MapStream(packed, SEED, {}).take(1, 0, 1)
