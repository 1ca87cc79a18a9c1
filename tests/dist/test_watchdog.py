"""A rank that hangs or dies is named by the others, with step, part, host and stacks; nobody waits for it.

The ranks live on: here the watchdog's `end` only notes the message.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dsv2.config.schema import WatchdogConfig
from dsv2.errors import PeerLost
from dsv2.parallel import watchdog
from dsv2.parallel.plan import Dim, ParallelPlan
from dsv2.parallel.progress import Part
from dsv2.parallel.watchdog import Watchdog

PATIENCE_S = 60


class Ends(NamedTuple):
    """What happened to a rank."""

    message: str  # of the watchdog
    stacks: str
    raised: str


class Bench:
    """A rank's mesh, and a watchdog whose end is an event."""

    def __init__(self, rank: int, world_size: int, folder: str, limit_s: float, slow_limit_s: float = 0):
        from dsv2.parallel.start import start_mesh

        self.mesh = start_mesh(ParallelPlan(world=world_size), rank, torch.device("cpu"))
        self.ended = threading.Event()
        self.message = ""
        config = WatchdogConfig(limit_s, slow_limit_s)
        self.watchdog = Watchdog(config, self.mesh, Path(folder), end=self._end)
        # The ranks of other tests use the same store.
        self.watchdog._board._store = torch.distributed.PrefixStore(folder, self.watchdog._board._store)

    def _end(self, message: str) -> None:
        self.message = message
        self.ended.set()

    def stacks(self) -> str:
        rank = self.mesh[Dim.world].rank
        return (self.watchdog._folder / f"rank-{rank:04d}.txt").read_text(encoding="utf-8")

    def ends(self, raised: str = "") -> Ends:
        return Ends(self.message, self.stacks(), raised)


def hang(rank: int, world_size: int, folder: str, part: str) -> Ends:
    """Rank 1 stays in a part of step 5 until its watchdog ends it; the others wait for it in a collective."""
    bench = Bench(rank, world_size, folder, limit_s=2)
    with bench.watchdog:
        bench.mesh.progress.enter(Part.data, 4)
        bench.mesh[Dim.world].agree(False)
        bench.watchdog._first_step = 4
        bench.mesh.progress.enter(Part(part), 5)
        if rank == 1:
            stay(bench)
        bench.mesh.progress.enter(Part.optimizer)
        bench.mesh[Dim.world].wait_for_all()
        assert bench.ended.wait(PATIENCE_S)
        bench.mesh[Dim.world].wait_for_all()  # nobody leaves before the last one is told
        return bench.ends()


def stay(bench: Bench) -> None:
    assert bench.ended.wait(PATIENCE_S)


@pytest.mark.parametrize("part", ["data", "report"])
def test_the_rank_that_hangs_is_named_and_all_write_their_stacks(pools, tmp_path, part):
    results = pools[2].run("tests.dist.test_watchdog:hang", folder=str(tmp_path), part=part)
    host = socket.gethostname()
    for ends in results:
        assert ends.message.startswith(
            f"rank 1 on {host} hung in step 5, {part}, at tests/dist/test_watchdog.py:"
        )
        assert (
            "(stay): no progress within watchdog.limit_s=2 s; the stacks of all ranks are in " in ends.message
        )
    assert ", in stay" not in results[0].stacks
    assert " in stay\n" in results[1].stacks
    assert " in wait_for_all\n" in results[0].stacks
    assert f"rank 0 on {host}: step 5, optimizer, for " in results[0].stacks


def stopped(rank: int, world_size: int, folder: str) -> Ends:
    """Rank 1 is stopped as a whole. The others wake it for its stacks."""
    bench = Bench(rank, world_size, folder, limit_s=1)
    watchdog.ANSWER_S = 1.0
    try:
        with bench.watchdog:
            bench.watchdog._first_step = 0
            bench.mesh.progress.enter(Part.data, 5)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            bench.mesh[Dim.world].wait_for_all()
            assert bench.ended.wait(PATIENCE_S)
            bench.mesh[Dim.world].wait_for_all()
            return bench.ends()
    finally:
        watchdog.ANSWER_S = 5.0


def test_a_rank_that_cannot_answer_is_named_and_woken_for_its_stacks(pools, tmp_path):
    zero, one = pools[2].run("tests.dist.test_watchdog:stopped", folder=str(tmp_path))
    named = (
        f"rank 1 on {socket.gethostname()} hung and does not answer: no progress within watchdog.limit_s=1 s"
    )
    assert zero.message.startswith(named)
    assert one.message == zero.message
    assert " in stopped\n" in one.stacks


def lose(rank: int, world_size: int, folder: str, notices: bool) -> Ends:
    """Rank 1 seems to die. Rank 0 notices it in a collective, or waits for ever as it would on a GPU."""
    watchdog.LOST_S = PATIENCE_S if notices else 1.0
    bench = Bench(rank, world_size, folder, limit_s=0)
    everyone = bench.mesh[Dim.world]
    if rank == 0:
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        bench.watchdog._here[1] = bench.watchdog._peers[1]._replace(pid=dead.pid)
        bench.watchdog._peers[1] = bench.watchdog._here[1]
    raised = ""
    try:
        with bench.watchdog:
            if rank == 0 and notices:
                raise PeerLost("another process has ended")
            assert bench.ended.wait(PATIENCE_S)
    except PeerLost as error:
        raised = str(error)
    finally:
        watchdog.LOST_S = 6.0
    everyone.wait_for_all()
    return Ends(bench.message, "", raised)


@pytest.mark.parametrize("notices", [True, False])
def test_a_lost_rank_is_named(pools, tmp_path, notices):
    zero, one = pools[2].run("tests.dist.test_watchdog:lose", folder=str(tmp_path), notices=notices)
    named = f"rank 1 on {socket.gethostname()} (process "
    assert (zero.raised if notices else zero.message).startswith(named)
    assert one.message.startswith(named), "a rank of another machine learns it through the store"


def progress(rank: int, world_size: int, folder: str) -> list[Any]:
    """Slow parts and the first step have the longer limit."""
    bench = Bench(rank, world_size, folder, limit_s=100, slow_limit_s=1000)
    seen = []
    for part, step in [
        ("start", 0),
        ("data", 3),
        ("optimizer", 3),
        ("data", 4),
        ("evaluation", 4),
        ("save", 4),
        ("profile", 4),
    ]:
        bench.mesh.progress.enter(Part(part), step)
        seen.append(bench.watchdog._limit_of(bench.mesh.progress.position))
    with bench.watchdog:
        watched = (bench.watchdog._folder / f"rank-{rank:04d}.txt").exists()
    return [*seen, watched]


def test_slow_parts_have_a_longer_limit_and_nothing_is_left_behind(pools, tmp_path):
    for seen in pools[2].run("tests.dist.test_watchdog:progress", folder=str(tmp_path)):
        slow, fast = "slow_limit_s", "limit_s"
        assert seen == [slow, slow, slow, fast, slow, slow, slow, True]
    assert not (tmp_path / "stacks").exists()
