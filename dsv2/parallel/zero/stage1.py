"""ZeRO-1 in fp32: optimizer states are partitioned over the ranks that hold the same parameters.

DeepSpeed keeps fp32 masters beside the weights even in fp32. From a step's first backward pass on, it also
keeps a reduction bucket of 5e8 elements, however small the model is.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dsv2.optimizers.base import GroupSizes
from dsv2.parallel.zero.base import FP32, Job, Range, Sharded, States, ZeroStage, flat
from dsv2.parallel.zero.experts import place

if TYPE_CHECKING:
    from torch import Tensor


def flat_ranges(
    owners: "Iterable[Tensor]", groups: Iterable[list[Any]], names: dict[int, str]
) -> Iterator[Range]:
    """Yield this rank's ranges of parameters. A group's flat weights are cut into one part per rank.

    Args:
        owners: this rank's part of each group.
        groups: the parameters of each group, which DeepSpeed has linked to the parts.
        names: the parameters' names by `id`.
    """
    for index, (owner, group) in enumerate(zip(owners, groups, strict=True)):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:  # another rank owns all of it
                continue
            offset, total = place(parameter, parameter.numel())
            yield Range(
                name=names[id(parameter)],
                offset=offset + mapping.lp_fragment_address.start,
                total=total,
                group=index,
                owner=owner,
                start=mapping.hp_fragment_address.start,
                length=mapping.hp_fragment_address.numel,
            )


class Partitioned(Sharded):
    """Every rank updates its part of the groups' flat weights."""

    def ranges(self) -> Iterator[Range]:
        optimizer = self.engine.optimizer
        owners = optimizer.single_partition_of_fp32_groups
        return flat_ranges(owners, optimizer.bit16_groups, self.names)

    def refresh(self) -> None:
        self.engine.optimizer.update_lp_params()
        self.engine.optimizer._hp_optimizer_states_linked = False


class Stage1(ZeroStage):
    number = 1
    sharded = Partitioned

    def owned(self, group: GroupSizes) -> int:
        return flat(group) // group.copies

    def states(self, job: Job) -> States:
        return States(
            weights=job.weight_bytes * sum(flat(group) for group in job.parameters),
            gradients=0,
            masters=FP32 * self.all_owned(job),
            moments=self.moments(job),
            buffers=0,
        )

    def traffic(self, micro_batches: int, weight_bytes: int) -> float:
        return 2 * FP32 + weight_bytes  # gradients summed in fp32, weights gathered

    def step_buffers(self, job: Job) -> float:
        return job.weight_bytes * job.bucket
