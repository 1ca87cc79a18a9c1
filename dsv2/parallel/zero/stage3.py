"""ZeRO-3: weights are partitioned too, and gathered per module for the forward and backward pass.

The reduction bucket of 5e8 elements always exists. Tensors of at most 1e5 elements stay whole. Up to 1e9
elements are gathered at a time.
"""

from collections.abc import Iterator

from dsv2.optimizers.base import GroupSizes, RankParameters
from dsv2.parallel.zero.base import BUCKET, FP32, Job, Range, Sharded, States, ZeroStage
from dsv2.parallel.zero.experts import place

PERSISTENT = 100_000  # stage3_param_persistence_threshold
LIVE = 1_000_000_000  # stage3_max_live_parameters
SUB_GROUP = 1_000_000_000  # sub_group_size


class FullyPartitioned(Sharded):
    """Every rank holds and updates its part of each parameter."""

    def ranges(self) -> Iterator[Range]:
        import torch.distributed as dist

        names = self.names
        optimizer = self.engine.optimizer
        for parameter in self.engine.module.parameters():
            sub_group, start, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
            offset, total = place(parameter, parameter.ds_numel)
            first = dist.get_rank(parameter.ds_process_group) * padded
            length = min(padded, parameter.ds_numel - first)  # the last ranks' parts end in padding
            if length > 0:
                yield Range(
                    name=names[id(parameter)],
                    offset=offset + first,
                    total=total,
                    group=optimizer.sub_group_to_group_id[sub_group],
                    owner=optimizer.fp32_partitioned_groups_flat[sub_group],
                    start=start,
                    length=length,
                )

    def refresh(self) -> None:
        optimizer = self.engine.optimizer
        for index, owner in enumerate(optimizer.fp32_partitioned_groups_flat):
            whole = optimizer.fp16_partitioned_groups_flat[index]
            whole.data.copy_(owner.data)
            partitions = optimizer.fp16_partitioned_groups[index]
            for partition, part in zip(partitions, optimizer.unflatten(whole, partitions), strict=True):
                partition.data = part.data
        if optimizer.persistent_parameters:
            # Small parameters stay gathered between steps; gather them again from their parts.
            first = optimizer.persistent_parameters[0]
            first.partition(optimizer.persistent_parameters)
            first.all_gather(optimizer.persistent_parameters)


class Stage3(ZeroStage):
    number = 3
    sharded = FullyPartitioned
    reduces_in_backward = True

    def owned(self, group: GroupSizes) -> int:
        return sum(-(-size // group.copies) for size in group.sizes)

    def states(self, job: Job) -> States:
        owned = self.all_owned(job)
        return States(
            weights=job.weight_bytes * (owned + _whole(job.parameters)),
            gradients=FP32 * owned,
            masters=FP32 * owned,
            moments=self.moments(job),
            buffers=job.weight_bytes * job.bucket,
        )

    def traffic(self, micro_batches: int, weight_bytes: int) -> float:
        return 3 * micro_batches * weight_bytes  # weights gathered twice, gradients scattered

    def step_gradients(self, job: Job) -> float:
        return 0  # `states` counts the gradients

    def step_buffers(self, job: Job) -> float:
        """Return the bytes of gathered weights. The weights of one module are gathered together.

        The routed experts of a layer count as one module.
        """
        parameters = job.parameters
        partitioned = sum(group.elements for group in parameters if group.copies > 1)
        module = _layer_of_experts(parameters) if parameters.experts.copies > 1 else 0
        largest = max(module, *parameters.decay.sizes)
        return job.weight_bytes * min(partitioned - _whole(parameters), max(LIVE, largest))

    def reduction(self, job: Job) -> float:
        # Experts and dense parameters alternate, and never share a bucket.
        decay, _, experts = job.parameters
        largest = max(*decay.sizes, *experts.sizes)
        bucket = max(largest, min(BUCKET, _layer_of_experts(job.parameters)))
        in_fp32 = 0 if job.weight_bytes == FP32 else FP32 / experts.copies
        return bucket * (job.weight_bytes + in_fp32)

    def stepping(self, job: Job) -> float:
        largest = max(self.owned(group) for group in job.parameters)
        return FP32 * min(largest, SUB_GROUP + max(job.parameters.decay.sizes))


def _whole(parameters: RankParameters) -> int:
    """Return the elements of small tensors that stay gathered beside their partitions."""
    partitioned = [group for group in parameters if group.copies > 1]
    return sum(size for group in partitioned for size in group.sizes if size <= PERSISTENT)


def _layer_of_experts(parameters: RankParameters) -> int:
    return sum(parameters.experts.sizes[:2])  # w13 and w2
