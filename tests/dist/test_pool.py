"""Ranks are forks of a server without threads, they import no compiler, and a failed rank is told."""

import os
import sys
from typing import Any

import psutil
import pytest


def threads_of_server(rank: int, world_size: int) -> tuple[int, int]:
    """Return the server's process, and its number of threads."""
    return os.getppid(), psutil.Process(os.getppid()).num_threads()


def test_the_fork_server_has_one_thread(pools):
    """A fork has none of the other threads, but the locks that these threads held."""
    for server, threads in pools[2].run("tests.dist.test_pool:threads_of_server"):
        assert server != os.getpid()
        assert threads == 1


def compilers(rank: int, world_size: int, **layout: Any) -> list[str]:
    """Train, and return what is imported of torch's compiler: it would take each rank 1.5 s."""
    from tests.dist import jobs

    jobs.train(rank, world_size, steps=1, **layout)
    names = ("torch._inductor.compile_fx", "torch._inductor.lowering", "torch._inductor.scheduler")
    return [name for name in names if name in sys.modules]


@pytest.mark.parametrize("stage", [0, 3])
def test_training_imports_no_compiler(pools, stage):
    assert pools[1].run("tests.dist.test_pool:compilers", ep=1, stage=stage, micro_batch=8) == [[]]


def fail(rank: int, world_size: int) -> None:
    assert rank == 0, f"rank {rank} of {world_size} fails"


def test_a_failed_rank_is_told(pools):
    with pytest.raises(AssertionError, match="rank 1 of 2 fails"):
        pools[2].run("tests.dist.test_pool:fail")
