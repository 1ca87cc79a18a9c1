"""Functions in processes of their own: a process group lives once a process."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def together(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """`function(rank, world_size, *arguments)` on every rank at once."""
    with ProcessPoolExecutor(world_size, mp_context=multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(function, rank, world_size, *arguments) for rank in range(world_size)]
        return [rank.result() for rank in ranks]
