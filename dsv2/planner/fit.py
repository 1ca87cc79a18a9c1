"""Compare what a run needs with the free memory, before any weight is allocated.

Without this check a run that is too large fails late. On the CPU the kernel then kills processes of the
whole machine.
"""

import math
from typing import NamedTuple

from dsv2.config.schema import Config
from dsv2.errors import UserError
from dsv2.parallel.gpus import find_gpu
from dsv2.parallel.host_memory import free_host_memory
from dsv2.planner.memory import Memory, memory
from dsv2.planner.search import MORE_GPUS, USABLE, Machines, layouts, plan, smallest_change
from dsv2.training.start import find_device

GIB = 2**30
PROCESS = 0.7 * GIB  # bytes of one process on the CPU for Python, torch and DeepSpeed
ELSEWHERE = "h100"  # the GPU of the proposal if nothing fits on this machine


class Room(NamedTuple):
    """The free memory that the job's processes on this machine have."""

    processes: int  # on this machine
    free: float  # bytes: of the whole machine, or of each process's GPU
    on_gpu: bool
    free_host: float = math.inf  # bytes of the whole machine, if `free` is a GPU's

    def needed(self, config: Config, world_size: int) -> float:
        """Return the bytes that a run needs of `free`."""
        needs = memory(config, world_size, gpu=self.on_gpu, resident=not self.on_gpu)
        if self.on_gpu:
            return needs.peak
        return self.processes * (needs.peak + _copied(config, needs) + PROCESS)


def find_room(device: str, processes: int) -> Room:
    """Return the free memory for the job's processes on this machine.

    Args:
        device: this process's, as `find_device` returns it.
        processes: the job's processes on this machine.
    """
    if device == "cpu":
        return Room(processes, free_host_memory(), on_gpu=False)
    import torch

    free = torch.cuda.mem_get_info(device)[0]
    return Room(processes, free, on_gpu=True, free_host=free_host_memory())


def check_machine(config: Config, world_size: int, processes: int) -> str:
    """Check that this machine can run its processes of the job. Return this process's device.

    Every entry calls this before it looks at files: the data may be prepared then, which takes a minute.

    Args:
        config: validated for `world_size`.
        world_size: the number of processes of the job, on all machines.
        processes: the job's processes on this machine.

    Raises:
        UserError: see `find_device` and `check_memory`.
    """
    device = find_device(config, processes)
    check_memory(config, world_size, find_room(device, processes))
    return device


def check_memory(config: Config, world_size: int, room: Room) -> None:
    """Refuse a run that needs more memory than is free.

    Args:
        config: validated for `world_size`.
        world_size: the number of processes of the job, on all machines.

    Raises:
        UserError: says both numbers, and which layout would fit.
    """
    if not config.runtime.check_memory:
        return
    needed = room.needed(config, world_size)
    if needed <= room.free:
        _check_copies(config, world_size, room)
        return
    where = "of its GPU's memory" if room.on_gpu else "of this machine's memory"
    who = f"{room.processes} processes need" if room.processes > 1 else "the process needs"
    if room.on_gpu:
        who = "each process needs"
    proposal = _proposal_here(config, world_size, room) or _proposal_elsewhere(config, world_size)
    raise UserError(
        f"runtime.check_memory=true: {who} about {needed / GIB:.1f} GiB {where}, of which "
        f"{room.free / GIB:.1f} GiB are free. {proposal}. runtime.check_memory=false starts the run anyway"
    )


def _copied(config: Config, needs: Memory) -> float:
    """Return the bytes of the host memory that a rank saves from; see dsv2/checkpoint/host_copy.py."""
    return needs.saved if config.checkpoint.asynchronous else 0


def _check_copies(config: Config, world_size: int, room: Room) -> None:
    """Refuse a run on GPUs whose copies for saves do not fit into this machine's memory."""
    if not room.on_gpu:  # `needed` has counted them
        return
    copies = room.processes * _copied(config, memory(config, world_size))
    if copies > room.free_host:
        raise UserError(
            f"checkpoint.asynchronous=true: the copies for saves need about {copies / GIB:.1f} GiB of this "
            f"machine's memory, of which {room.free_host / GIB:.1f} GiB are free. checkpoint.asynchronous="
            "false needs no copies. runtime.check_memory=false starts the run anyway"
        )


def _proposal_here(config: Config, world_size: int, room: Room) -> str | None:
    """Return the layout that fits into the room with the fewest changes; None if no layout does."""
    before = _settings(config)
    fitting = [
        (changes, needed)
        for candidate in layouts(config, world_size)
        if (needed := room.needed(candidate, world_size)) <= USABLE * room.free
        and (changes := dict(_settings(candidate).items() - before.items()))
    ]
    if not fitting:
        return None
    changes, needed = min(fitting, key=lambda layout: (len(layout[0]), -layout[1]))
    return f"This fits: {_words(changes)} ({needed / GIB:.1f} GiB)"


def _proposal_elsewhere(config: Config, world_size: int) -> str:
    """Return how many GPUs the run needs, and the layout on them."""
    start = plan(config, Machines(world_size, find_gpu(ELSEWHERE)))
    fitting = start if start.fits else smallest_change(start)
    nothing_here = f"No layout of {world_size} processes fits here"
    if fitting is None:
        return (
            f"{nothing_here}, nor any of up to {world_size * MORE_GPUS[-1]} {ELSEWHERE}; use a smaller model"
        )
    gpus = f"{fitting.machines.gpus} x {fitting.machines.gpu.name}"
    return f"{nothing_here}; on {gpus} this does: {_words(_settings(fitting.config))}"


def _settings(config: Config) -> dict[str, object]:
    return {
        "parallel.expert_parallel_size": config.parallel.expert_parallel_size,
        "parallel.zero_stage": config.parallel.zero_stage,
        "runtime.micro_batch_size": config.runtime.micro_batch_size,
        "runtime.recompute": str(config.runtime.recompute).lower(),
    }


def _words(settings: dict[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())
