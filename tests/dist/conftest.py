from collections.abc import Iterator

import pytest

from tests.dist.pool import Pool


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, Pool]]:
    """Pools by world size, started when first asked for."""

    class Pools(dict[int, Pool]):
        def __missing__(self, world_size: int) -> Pool:
            self[world_size] = Pool(world_size)
            return self[world_size]

    started = Pools()
    yield started
    for pool in started.values():
        pool.close()
