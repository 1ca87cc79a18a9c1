"""Count the bytes that one rank holds between steps, and those at each moment that may be the peak.

The ZeRO stages (parallel/zero) count the bytes of DeepSpeed and of the optimizer. planner/activations.py
counts those of a micro-batch. This module sums them. tests/dist/test_plan_memory.py compares the sums with
real engines.
"""

from typing import NamedTuple

from dsv2.config.schema import Config, ExpertExchange, Precision
from dsv2.kernels.specs import find_spec
from dsv2.moe.memory import symmetric_buffer
from dsv2.moe.routers.kinds import router_of
from dsv2.optimizers.rules import find_optimizer
from dsv2.parallel.micro_batch import micro_batch
from dsv2.parallel.plan import Dim, ParallelPlan
from dsv2.parallel.zero.base import BUCKET, FP32, Job, States
from dsv2.parallel.zero.stages import find_stage
from dsv2.planner.activations import Activations, activations
from dsv2.planner.parameters import rank_parameters


class Memory(NamedTuple):
    """Holds the bytes that one rank needs."""

    states: States
    step_gradients: float  # the additional gradients that exist while a step accumulates
    step_buffers: float  # the reduction bucket, its copies, gathered weights, and the symmetric buffer
    activations: Activations
    phases: dict[str, float]  # bytes at each moment that may be the peak
    saved: int  # bytes of a checkpoint that the rank writes

    @property
    def peak(self) -> float:
        """Return the largest number of bytes in use at any moment."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        """Return the name of the moment at which the peak occurs."""
        return max(self.phases, key=lambda name: self.phases[name])


def memory(config: Config, world_size: int, gpu: bool = True, resident: bool = False) -> Memory:
    """Return the bytes that each of `world_size` ranks needs for this configuration.

    Args:
        config: the whole configuration, validated for `world_size`.
        world_size: the number of ranks of the job.
        gpu: if False, count what torch's CPU kernels keep. Tests without a GPU compare this count.
        resident: leave out the part of the reduction bucket that no gradient touches. On the CPU it takes no
            memory; a GPU's allocator reserves it.
    """
    optim = config.optim
    runtime = config.runtime
    ep_size = config.parallel.expert_parallel_size
    stage = find_stage(config.parallel.zero_stage, runtime.precision)
    layout = ParallelPlan.of(config.parallel, world_size)
    parameters = rank_parameters(config.model, layout)
    job = Job(
        parameters=parameters,
        optimizer=find_optimizer(optim.name),
        weight_bytes=2 if runtime.precision is Precision.bf16 else FP32,
        state_bytes=2 if optim.states is Precision.bf16 else FP32,
        several_micro_batches=optim.batch_size > runtime.micro_batch_size * layout.sizes[Dim.dp],
        fused=find_spec(runtime.kernels).is_fused,
        bucket=min(BUCKET, parameters.elements) if resident else BUCKET,
    )
    states = stage.states(job)
    ranks_per_token = router_of(config.model).mean_ranks(config.model, ep_size)
    run = micro_batch(config, ranks_per_token, fused_norm=gpu)
    needed = activations(run)
    exchange = 0
    if ep_size > 1 and config.parallel.expert_exchange is ExpertExchange.symmetric:
        rows, row_bytes = symmetric_buffer(run)
        exchange = 2 * rows * row_bytes
    buffers = stage.step_buffers(job)
    reduction = stage.reduction(job)
    in_backward = reduction if stage.reduces_in_backward else 0
    held = states.total + exchange
    after_backward = held + stage.gradients_after_backward(job)
    passes = stage.forward_and_backward(job, needed)
    return Memory(
        states=states,
        step_gradients=stage.step_gradients(job),
        step_buffers=buffers + reduction + exchange,
        activations=needed,
        phases={
            "building": stage.building(job),
            "forward and backward": held + buffers + in_backward + passes,
            "gradient reduction": after_backward + buffers + reduction,
            "optimizer step": after_backward + stage.stepping(job),
        },
        saved=stage.saved(job),
    )
