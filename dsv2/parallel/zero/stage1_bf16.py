"""ZeRO-1 in bf16, with our own optimizer step (bf16_optimizer.py) inside DeepSpeed's BF16_Optimizer.

Each rank keeps the WHOLE fp32 gradient of its parameters, and reduces it in fp32 and in place. If a gradient
is a single term, because the step has one micro-batch and no other rank holds the parameter, it stays in
bf16. DeepSpeed first allocates fp32 masters and gradient sums; those that are not needed are freed.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from dsv2.config.schema import OptimConfig, Precision, RuntimeConfig
from dsv2.optimizers.base import GroupSizes, Optimizer
from dsv2.parallel.plan import Dim
from dsv2.parallel.zero.base import (
    FP32,
    ActivationBytes,
    Job,
    Range,
    Sharded,
    States,
    ZeroStage,
    flat,
)
from dsv2.parallel.zero.buckets import buckets
from dsv2.parallel.zero.stage1 import Partitioned, flat_ranges

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dsv2.kernels.sets import KernelSet
    from dsv2.parallel.mesh import Mesh


def _has_sum(group: GroupSizes, job: Job) -> bool:
    """Return whether a group's gradient has several terms, of micro-batches or ranks, and so an fp32 sum."""
    return job.several_micro_batches or group.copies > 1


class PartitionedBF16(Partitioned):
    """Like `Partitioned`, with ZeRO1BF16 as DeepSpeed's optimizer. It counts its steps on the host."""

    _first_micro_batch = True

    def ranges(self) -> Iterator[Range]:
        optimizer = self.engine.optimizer
        return flat_ranges(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, self.names)

    def backward(self, loss: "Tensor", *, last: bool) -> None:
        self.engine.optimizer.start_backward(first=self._first_micro_batch, last=last)
        self._first_micro_batch = last
        super().backward(loss, last=last)

    def update(self, lr: float, *, apply: bool) -> None:
        self.engine.optimizer.applies_update = apply
        super().update(lr, apply=True)

    @property
    def steps_done(self) -> float:
        return self.engine.optimizer.steps_done

    @steps_done.setter
    def steps_done(self, count: float) -> None:
        self.engine.optimizer.steps_done = int(count)


class Stage1BF16(ZeroStage):
    number = 1
    sharded = PartitionedBF16
    reduces_in_backward = True
    bucket = 25_000_000  # elements of the parameters that are reduced and gathered together; about a layer's

    def check(self, optim: OptimConfig, runtime: RuntimeConfig) -> None:
        """Accept either precision of the states."""

    def settings(self, optim: OptimConfig, runtime: RuntimeConfig, ranks: int) -> dict[str, Any]:
        settings = super().settings(optim, runtime, ranks)
        # Each gradient is added to its fp32 sum as soon as it exists, then freed.
        settings["bf16"]["immediate_grad_update"] = True
        return settings

    def flat(self, group: GroupSizes) -> int:
        """Return the elements of a group's buckets, each padded for its partitions."""
        parts = (group.sizes[part] for part in buckets(group.sizes, self.bucket))
        return sum(flat(GroupSizes(sizes, group.copies)) for sizes in parts)

    def owned(self, group: GroupSizes) -> int:
        return self.flat(group) // group.copies

    def states(self, job: Job) -> States:
        elements = sum(self.flat(group) for group in job.parameters)
        summed = sum(self.flat(group) for group in job.parameters if _has_sum(group, job))
        return States(
            weights=job.weight_bytes * elements,
            gradients=FP32 * summed,
            masters=FP32 * self.all_owned(job) if job.state_bytes == FP32 else 0,
            moments=self.moments(job),
            buffers=0,
        )

    def traffic(self, micro_batches: int, weight_bytes: int) -> float:
        return FP32 + weight_bytes  # gradients scattered in fp32, weights gathered

    def step_gradients(self, job: Job) -> float:
        # A bf16 gradient is freed as soon as it has been added to its fp32 sum.
        summed = max((max(group.sizes) for group in job.parameters if _has_sum(group, job)), default=0)
        return self.gradients_after_backward(job) + job.weight_bytes * summed

    def gradients_after_backward(self, job: Job) -> float:
        return job.weight_bytes * sum(group.elements for group in job.parameters if not _has_sum(group, job))

    def stepping(self, job: Job) -> float:
        """Return the bytes of the temporaries for the longest range of one tensor that a rank owns."""
        if job.fused:
            return 0
        bf16_states = job.state_bytes != FP32
        sizes = []
        for group in job.parameters:
            copies = job.optimizer.update_copies(bf16_states=bf16_states, fp32_gradient=_has_sum(group, job))
            sizes.append(copies * FP32 * min(max(group.sizes), self.owned(group)))
        return max(sizes)

    def building(self, job: Job) -> float:
        """Return the larger of two sizes: the model as built; DeepSpeed's flat weights, masters and sums."""
        begun = sum((2 + FP32) * self.flat(group) + FP32 * self.owned(group) for group in job.parameters)
        return max(super().building(job), begun)

    def forward_and_backward(self, job: Job, activations: ActivationBytes) -> float:
        if all(_has_sum(group, job) for group in job.parameters):
            return super().forward_and_backward(job, activations)
        # Gradients of one term are allocated while activations are freed. In the top layer's backward pass
        # only the head's gradient exists, in the first layer's all gradients do.
        head = job.weight_bytes * max(job.parameters.decay.sizes)
        return max(
            activations.kept + activations.logits,
            activations.layers + head,
            activations.single + self.step_gradients(job),
        )

    def wrap(
        self,
        model: "nn.Module",
        optimizer: Optimizer,
        *,
        optim: OptimConfig,
        runtime: RuntimeConfig,
        mesh: "Mesh",
        kernels: "KernelSet",
    ) -> Sharded:
        from dsv2.parallel.zero.bf16_optimizer import BF16Engine
        from dsv2.parallel.zero.deepspeed_engine import make_engine

        bf16_states = optim.states is Precision.bf16
        initialize = partial(BF16Engine, mesh=mesh, rule=optimizer, kernels=kernels, bf16_states=bf16_states)
        settings = self.settings(optim, runtime, mesh[Dim.dp].size)
        engine = make_engine(model, optimizer, optim, initialize, settings=settings, bucket=self.bucket)
        return self.sharded(engine, optimizer, mesh, optim)
