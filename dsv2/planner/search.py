"""Find the layouts that fit, and the smallest change that makes a layout fit."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from dsv2.config.schema import Config
from dsv2.errors import UserError
from dsv2.parallel.gpus import Gpu
from dsv2.parallel.zero.stages import numbers
from dsv2.planner.memory import Memory, memory
from dsv2.planner.speed import Speed, speed
from dsv2.training.validate import validate

# The usable share of a GPU's memory. CUDA, NCCL, fragmentation and unevenly loaded experts need the rest.
USABLE = 0.9
MORE_GPUS = (2, 4, 8, 16, 32)  # if nothing fits, the search tries these multiples of the GPUs


class Machines(NamedTuple):
    """Describes the GPUs of a job."""

    gpus: int  # of all machines together
    gpu: Gpu
    gpus_per_node: int = 8
    mfu: float | None = None  # measured over the whole step; None: the step's time is estimated

    @property
    def usable(self) -> float:
        """Return the bytes that a rank may use."""
        return self.gpu.memory * USABLE


class Planned(NamedTuple):
    """Holds a configuration, its machines, and the memory and time that it needs."""

    config: Config
    machines: Machines
    memory: Memory
    speed: Speed

    @property
    def fits(self) -> bool:
        """Return whether the peak is within the usable memory."""
        return self.memory.peak <= self.machines.usable

    def words(self) -> dict[str, object]:
        """Return the layout as names and values that `python -m dsv2 plan` takes."""
        parallel = self.config.parallel
        runtime = self.config.runtime
        return {
            "gpus": self.machines.gpus,
            "ep": parallel.expert_parallel_size,
            "zero": parallel.zero_stage,
            "micro_batch": runtime.micro_batch_size,
            "runtime.recompute": str(runtime.recompute).lower(),
        }


def plan(config: Config, machines: Machines) -> Planned:
    """Return the configuration with the memory and time that it needs.

    The configuration must be valid for as many processes as there are GPUs.
    """
    gpus, gpu, per_node, mfu = machines
    return Planned(config, machines, memory(config, gpus), speed(config, gpus, gpu, per_node, mfu))


def layouts(config: Config, gpus: int) -> Iterator[Config]:
    """Yield every layout of `gpus` processes that train.py accepts for this model and batch."""
    experts = config.model.n_routed_experts
    micro_batches = [2**power for power in range(max(1, config.optim.batch_size // gpus).bit_length())]
    for ep in (size for size in range(1, experts + 1) if experts % size == 0 and gpus % size == 0):
        for stage in numbers(config.runtime.precision):
            for micro_batch in micro_batches:
                for recompute in (False, True):
                    candidate = replace(
                        config,
                        parallel=replace(config.parallel, expert_parallel_size=ep, zero_stage=stage),
                        runtime=replace(config.runtime, micro_batch_size=micro_batch, recompute=recompute),
                    )
                    try:
                        validate(candidate, gpus)
                    except UserError:
                        continue
                    yield candidate


def search(config: Config, machines: Machines) -> list[Planned]:
    """Return the layouts that fit, fastest first. Among equally fast layouts the lowest peak comes first."""
    planned = (plan(candidate, machines) for candidate in layouts(config, machines.gpus))
    fitting = [layout for layout in planned if layout.fits]
    return sorted(fitting, key=lambda layout: (layout.speed.step_s, layout.memory.peak))


def changes(before: Planned, after: Planned) -> dict[str, object]:
    """Return the words of `after` whose values differ from those in `before`."""
    old_words = before.words()
    return {word: value for word, value in after.words().items() if value != old_words[word]}


def smallest_change(start: Planned) -> Planned | None:
    """Return the layout that fits and differs from `start` in the fewest words; None if no layout fits.

    Of several such layouts the fastest is returned. More GPUs are tried only if nothing fits on the GPUs of
    `start`.
    """
    for times in (1, *MORE_GPUS):
        machines = start.machines._replace(gpus=start.machines.gpus * times)
        if fitting := search(start.config, machines):
            return min(fitting, key=lambda layout: len(changes(start, layout)))
    return None
