"""A few gloo processes that stay up and run one job after another.

Importing torch and DeepSpeed takes a process 5 s: a fork server imports them once for all pools, and
many layouts share a pool.
"""

import gc
import importlib
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 120
JOB_TIMEOUT_S = 120


def _serve(rank: int, world_size: int, rendezvous: str, pipe: Connection) -> None:
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
    gc.freeze()  # modules never go; without them, collecting a job's garbage is quick
    pipe.send(("ready", None))
    while (job := pipe.recv()) is not None:
        module, function, arguments = job
        try:
            result = getattr(importlib.import_module(module), function)(rank, world_size, **arguments)
            pipe.send(("done", result))
        except BaseException:
            pipe.send(("failed", traceback.format_exc()))
        else:
            _end_groups()
    dist.barrier()
    os._exit(0)  # nothing is left to do, and taking everything apart takes seconds


def _end_groups() -> None:
    """End the process groups that a job made for itself.

    Every gloo group has threads that poll. After some hundred jobs, idle workers used whole cores.
    """
    import torch.distributed as dist
    from deepspeed.utils import groups

    caches = (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP)
    kept = [dist.group.WORLD, groups._WORLD_GROUP, *(group for cache in caches for group in cache.values())]
    for group in list(dist.distributed_c10d._world.pg_map):
        if not any(group is other for other in kept):
            dist.destroy_process_group(group)
    gc.collect()  # engines are cycles, and hold groups


class Pool:
    """`world_size` processes with one process group."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["dsv2.training.engine", "dsv2.checkpoint.store", "tests.dist.jobs"])
        pairs = [context.Pipe() for _ in range(world_size)]
        self._pipes = [here for here, _ in pairs]
        rendezvous = str(Path(self._folder.name) / "rendezvous")
        self._processes = [
            context.Process(target=_serve, args=(rank, world_size, rendezvous, there), daemon=True)
            for rank, (_, there) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()
        self._collect(START_TIMEOUT_S)

    def run(self, job: str, **arguments: Any) -> list[Any]:
        """Run `function(rank, world_size, **arguments)` on every rank; `job` is "module:function".

        After a failure the ranks may stand at different places: the pool is over.
        """
        module, function = job.split(":")
        for pipe in self._pipes:
            pipe.send((module, function, arguments))
        return self._collect(JOB_TIMEOUT_S)

    def _collect(self, timeout: float) -> list[Any]:
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout if not failures else 1):
                failures.append(f"rank {rank} of {self.world_size} gave no answer in {timeout} s")
                continue
            kind, value = pipe.recv()
            (failures if kind == "failed" else results).append(value)
        if failures:
            self.kill()
            raise AssertionError("\n".join(failures))
        return results

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        if not self.alive:
            return
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(30)
        self.kill()

    def kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()
