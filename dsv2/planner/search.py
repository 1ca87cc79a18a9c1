"""Which layouts fit, and what the smallest change is that makes a layout fit."""

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

USABLE = 0.9  # of a GPU's memory; the rest is for CUDA, NCCL, fragments, and experts of uneven load
MORE_GPUS = (2, 4, 8, 16, 32)  # times as many, tried where nothing fits


class Machines(NamedTuple):
    gpus: int
    gpu: Gpu
    gpus_per_node: int = 8
    mfu: float | None = None  # the whole step's, where it is known

    @property
    def usable(self) -> float:
        """Bytes a rank may take."""
        return self.gpu.memory * USABLE


class Planned(NamedTuple):
    config: Config
    machines: Machines
    memory: Memory
    speed: Speed

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.machines.usable

    def words(self) -> dict[str, object]:
        """The layout as the planner's own words and overrides."""
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
    """Memory and time of this configuration; it must be valid for as many processes as GPUs."""
    gpus, gpu, per_node, mfu = machines
    return Planned(config, machines, memory(config, gpus), speed(config, gpus, gpu, per_node, mfu))


def _layouts(config: Config, gpus: int) -> Iterator[Config]:
    """Every layout of `gpus` processes that train.py accepts for this model and batch."""
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
    """The layouts that fit, the fastest first; of equally fast ones the smallest first."""
    planned = (plan(candidate, machines) for candidate in _layouts(config, machines.gpus))
    fitting = [one for one in planned if one.fits]
    return sorted(fitting, key=lambda one: (one.speed.step_s, one.memory.peak))


def changes(given: Planned, other: Planned) -> dict[str, object]:
    """The words of `other` that differ from those of `given`."""
    before = given.words()
    return {word: value for word, value in other.words().items() if value != before[word]}


def smallest_change(given: Planned) -> Planned | None:
    """The fitting layout that differs in the fewest words, the fastest of those; None: none was found.

    More GPUs are tried only where nothing fits on those given.
    """
    for times in (1, *MORE_GPUS):
        machines = given.machines._replace(gpus=given.machines.gpus * times)
        if fitting := search(given.config, machines):
            return min(fitting, key=lambda one: len(changes(given, one)))
    return None
