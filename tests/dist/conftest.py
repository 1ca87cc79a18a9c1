from collections.abc import Iterator

import pytest

from tests.dist.pool import Pool


class Pools:
    """Pools by world size, started when first asked for, and anew after a failure."""

    def __init__(self) -> None:
        self._started: dict[int, Pool] = {}

    def __getitem__(self, world_size: int) -> Pool:
        if world_size not in self._started or not self._started[world_size].alive:
            self._started[world_size] = Pool(world_size)
        return self._started[world_size]

    def close(self) -> None:
        for pool in self._started.values():
            pool.close()


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    started = Pools()
    yield started
    started.close()
