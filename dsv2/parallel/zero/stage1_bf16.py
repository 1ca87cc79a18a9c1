"""ZeRO-1 in bf16, with our own optimizer step (bf16_optimizer.py) inside DeepSpeed's BF16_Optimizer.

Each rank keeps the WHOLE fp32 gradient of its parameters. It reduces the gradient in fp32 and in place,
except in groups that share a bucket. With one micro-batch on one rank the gradient stays in bf16. DeepSpeed
first allocates fp32 masters and gradient sums; those that are not needed are freed.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from dsv2.config.schema import OptimConfig, Precision, RuntimeConfig
from dsv2.optimizers.base import GroupSizes, Optimizer
from dsv2.parallel.plan import Dim
from dsv2.parallel.zero.base import (
    BUCKET,
    FP32,
    ActivationBytes,
    Job,
    Range,
    Sharded,
    States,
    ZeroStage,
    flat,
)
from dsv2.parallel.zero.stage1 import Partitioned, flat_ranges

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dsv2.kernels.sets import KernelSet
    from dsv2.parallel.mesh import Mesh


class PartitionedBF16(Partitioned):
    """Like `Partitioned`, with ZeRO1BF16 as DeepSpeed's optimizer. It counts its steps on the host."""

    _first_micro_batch = True

    def ranges(self) -> Iterator[Range]:
        optimizer = self.engine.optimizer
        return flat_ranges(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, self.names)

    def backward(self, loss: "Tensor", *, last: bool) -> None:
        if self._first_micro_batch:
            self.engine.optimizer.start_step(one_micro_batch=last)
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

    def check(self, optim: OptimConfig, runtime: RuntimeConfig) -> None:
        """Accept either precision of the states."""

    def settings(self, optim: OptimConfig, runtime: RuntimeConfig, ranks: int) -> dict[str, Any]:
        settings = super().settings(optim, runtime, ranks)
        # Each gradient is added to its fp32 sum as soon as it exists, then freed.
        settings["bf16"]["immediate_grad_update"] = True
        # Without this, the fp32 sums would be rounded to bf16 and reduced over the ranks in bf16. Stages 2
        # and 3 reduce each micro-batch's bf16 gradients; this setting would cost them GiB of copies.
        settings["communication_data_type"] = "fp32"
        return settings

    def owned(self, group: GroupSizes) -> int:
        return flat(group) // group.copies

    def states(self, job: Job) -> States:
        elements = sum(flat(group) for group in job.parameters)
        return States(
            weights=job.weight_bytes * elements,
            gradients=FP32 * elements if job.several_terms else 0,
            masters=FP32 * self.all_owned(job) if job.state_bytes == FP32 else 0,
            moments=self.moments(job),
            buffers=0,
        )

    def traffic(self, micro_batches: int, weight_bytes: int) -> float:
        return 2 * FP32 + weight_bytes  # gradients summed in fp32, weights gathered

    def step_gradients(self, job: Job) -> float:
        if not job.several_terms:
            return super().step_gradients(job)
        # A bf16 gradient is freed as soon as it has been added to its fp32 sum.
        return 2 * max(*job.parameters.decay.sizes, *job.parameters.experts.sizes)

    def gradients_after_backward(self, job: Job) -> float:
        return 0 if job.several_terms else self.step_gradients(job)

    def reduction(self, job: Job) -> float:
        # A group's gradients are one flat tensor. Groups that share a bucket are concatenated first. One
        # process reduces nothing.
        decay = job.parameters.decay
        return 0 if decay.elements > BUCKET or decay.copies == 1 else FP32 * job.parameters.dense

    def stepping(self, job: Job) -> float:
        """Return the bytes of the temporaries for the longest range of one tensor that a rank owns."""
        if job.fused:
            return 0
        bf16_states = job.state_bytes != FP32
        copies = job.optimizer.update_copies(bf16_states=bf16_states, fp32_gradient=job.several_terms)
        return copies * FP32 * max(min(max(group.sizes), self.owned(group)) for group in job.parameters)

    def building(self, job: Job) -> float:
        """Return the larger of two sizes: the model as built; DeepSpeed's flat weights, masters and sums."""
        begun = sum((2 + FP32) * flat(group) + FP32 * self.owned(group) for group in job.parameters)
        return max(super().building(job), begun)

    def forward_and_backward(self, job: Job, activations: ActivationBytes) -> float:
        if job.several_terms:
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
        engine = make_engine(model, optimizer, optim, initialize, settings)
        return self.sharded(engine, optimizer, mesh, optim)
