"""The layout of a job: named dimensions, their sizes and each rank's coordinates. Imports no torch.

Ranks are stage-major: `rank = stage * dp + d`. An expert-parallel group is `ep` neighbours within one
stage, so that it stays inside a machine. `mesh.py` gives every dimension its collectives.
"""

from dataclasses import dataclass
from enum import StrEnum

from dsv2.config.schema import ParallelConfig, RuntimeConfig


class Dim(StrEnum):
    """A dimension of the layout: the ranks that differ only in this coordinate."""

    world = "world"  # all processes of the job
    pp = "pp"  # the stages of the pipeline
    dp = "dp"  # ranks of one stage; each has different data
    ep = "ep"  # ranks of one stage that share one copy of the routed experts
    edp = "edp"  # ranks of one stage that hold the same experts


@dataclass(frozen=True)
class ParallelPlan:
    """Sizes of all dimensions; `validate()` has checked that they divide one another."""

    world: int = 1
    ep: int = 1
    pp: int = 1

    @staticmethod
    def of(parallel: ParallelConfig, world: int) -> "ParallelPlan":
        """Return the plan of a configuration for `world` processes."""
        return ParallelPlan(world=world, ep=parallel.expert_parallel_size)

    @property
    def sizes(self) -> dict[Dim, int]:
        """Return the number of ranks along each dimension."""
        dp = self.world // self.pp
        return {Dim.world: self.world, Dim.pp: self.pp, Dim.dp: dp, Dim.ep: self.ep, Dim.edp: dp // self.ep}

    def coordinate(self, rank: int, dim: Dim) -> int:
        """Return the position of the world's `rank` along `dim`, counted from 0."""
        return rank // self._stride(dim) % self.sizes[dim]

    def members(self, rank: int, dim: Dim) -> list[int]:
        """Return the world's ranks along `dim` through `rank`: all other coordinates are equal."""
        stride = self._stride(dim)
        first = rank - self.coordinate(rank, dim) * stride
        return [first + index * stride for index in range(self.sizes[dim])]

    def text(self, device: str, parallel: ParallelConfig, runtime: RuntimeConfig) -> str:
        """Return the layout in words, such as "2 x cpu, expert parallel 2, ZeRO-1, fp32"."""
        return (
            f"{self.world} x {device}, expert parallel {self.ep}, ZeRO-{parallel.zero_stage}, "
            f"{runtime.precision.value}"
        )

    def _stride(self, dim: Dim) -> int:
        """Return the distance in ranks between neighbours along `dim`."""
        return {Dim.pp: self.sizes[Dim.dp], Dim.edp: self.ep}.get(dim, 1)
