"""A few gloo processes that run one job.

Importing torch and DeepSpeed takes a process 8 s. A fork server imports them once (preload.py), and each rank
of each job is a fork of it. So 4 ranks start in 0.2 s, and no job sees what another one left behind.
"""

import importlib
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

START_TIMEOUT_S = 120
JOB_TIMEOUT_S = 120


def fork_server() -> Any:
    """Return the context whose processes are forks of the fork server. The first one starts the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.dist.preload"])
    return context


class Job(NamedTuple):
    """A function, as "module:function", and its arguments after `rank` and `world_size`."""

    name: str
    arguments: dict[str, Any]

    def run(self, rank: int, world_size: int) -> Any:
        module, function = self.name.split(":")
        return getattr(importlib.import_module(module), function)(rank, world_size, **self.arguments)


def _serve(rank: int, world_size: int, rendezvous: str, job: Job, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=JOB_TIMEOUT_S),
    )
    pipe.send(("ready", None))
    try:
        pipe.send(("done", job.run(rank, world_size)))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
    pipe.recv()  # others may still communicate with this rank; the pool ends all ranks together


class Pool:
    """`world_size` processes with one process group, forked anew for each job."""

    def __init__(self, world_size: int):
        self.world_size = world_size

    def run(self, job: str, **arguments: Any) -> list[Any]:
        """Run `function(rank, world_size, **arguments)` on every rank; `job` is "module:function"."""
        context = fork_server()
        pairs = [context.Pipe() for _ in range(self.world_size)]
        with tempfile.TemporaryDirectory() as folder:
            common = (self.world_size, str(Path(folder) / "rendezvous"), Job(job, arguments))
            processes = [
                context.Process(target=_serve, args=(rank, *common, there), daemon=True)
                for rank, (_, there) in enumerate(pairs)
            ]
            for process in processes:
                process.start()
            try:
                pipes = [here for here, _ in pairs]
                self._collect(pipes, START_TIMEOUT_S)
                return self._collect(pipes, JOB_TIMEOUT_S)
            finally:
                for process in processes:
                    process.kill()  # taking everything apart would take seconds
                    process.join()
                    process.close()

    def _collect(self, pipes: list[Connection], timeout: float) -> list[Any]:
        results, failures = [], []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(timeout if not failures else 1):
                failures.append(f"rank {rank} of {self.world_size} gave no answer in {timeout} s")
                continue
            kind, value = pipe.recv()
            (failures if kind == "failed" else results).append(value)
        if failures:
            raise AssertionError("\n".join(failures))
        return results
