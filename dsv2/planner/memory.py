"""Bytes of one rank under DeepSpeed 0.19.8 as dsv2/training/engine.py sets it up.

`states` is what stays between steps, to the element: tests/dist/test_plan_memory.py holds it to the
storages of real engines. `memory` adds the moments at which a rank needs most.

What DeepSpeed does with the settings of `deepspeed_config`:
- ZeRO-0 (fp32): torch's own AdamW on the model's parameters.
- ZeRO-1 in bf16: BF16_Optimizer, and ours over it. Each rank keeps the WHOLE fp32 gradient of its parameters,
  and reduces it in fp32, in place but for groups that share a bucket. A gradient that is one micro-batch's
  on one rank stays in bf16. DeepSpeed begins with fp32 masters and sums; those not needed are let go.
- ZeRO-1 in fp32 and ZeRO-2: masters beside the weights even in fp32, and a reduction bucket of 5e8
  elements from the first backward of a step on, however small the model.
- ZeRO-3: that bucket always; tensors of at most 1e5 elements stay whole; up to 1e9 elements are gathered.
"""

from typing import NamedTuple

from dsv2.config.schema import Config, Precision
from dsv2.kernels.specs import find_spec
from dsv2.planner.activations import FP32, Activations, activations, make_pass
from dsv2.planner.parameters import Group, RankParameters, rank_parameters

BUCKET = 500_000_000  # elements; zero_optimization.reduce_bucket_size
PERSISTENT = 100_000  # stage3_param_persistence_threshold
LIVE = 1_000_000_000  # stage3_max_live_parameters
SUB_GROUP = 1_000_000_000  # sub_group_size of ZeRO-3


class Layout(NamedTuple):
    """What of the configuration decides how states are kept."""

    stage: int
    bf16: bool  # runtime.precision
    states: int  # bytes of an element of masters and moments
    sums: bool  # has a step's gradient several terms, micro-batches or ranks?
    fused: bool  # runtime.kernels

    @property
    def size(self) -> int:
        """Bytes of a weight."""
        return 2 if self.bf16 else FP32

    @property
    def ours(self) -> bool:
        """ZeRO-1 in bf16, of which dsv2/parallel/zero/stage1_bf16.py has its part."""
        return self.stage == 1 and self.bf16


def _layout(config: Config, world_size: int) -> Layout:
    parallel = config.parallel
    return Layout(
        stage=parallel.zero_stage,
        bf16=config.runtime.precision is Precision.bf16,
        states=2 if config.optim.states is Precision.bf16 else FP32,
        sums=config.optim.batch_size > config.runtime.micro_batch_size,
        fused=find_spec(config.runtime.kernels).is_fused,
    )


class States(NamedTuple):
    """Bytes that stay on a rank between steps."""

    weights: int
    gradients: int
    masters: int  # weights beside the model's own
    moments: int  # Adam's two
    buffers: int

    @property
    def total(self) -> int:
        return sum(self)


def _owned(group: Group, stage: int) -> int:
    """Elements of the group whose fp32 weights and moments this rank keeps."""
    if stage == 0:
        return group.elements
    if stage == 3:
        return sum(-(-size // group.copies) for size in group.sizes)
    return _flat(group) // group.copies


def _flat(group: Group) -> int:
    """Elements of the group's flat buffer under ZeRO-1 and 2, which pads it for its partitions."""
    unit = 2 * group.copies
    return -(-group.elements // unit) * unit


def states(parameters: RankParameters, layout: Layout) -> States:
    """Bytes after a step: nothing in flight, no activations."""
    stage, size = layout.stage, layout.size
    owned = sum(_owned(group, stage) for group in parameters)
    moments = 2 * layout.states * owned
    if stage == 0:
        return States(FP32 * owned, 0, 0, moments, 0)
    if stage == 3:
        weights = size * (owned + _stays_whole(parameters))
        return States(weights, FP32 * owned, FP32 * owned, moments, size * BUCKET)
    flat = sum(_flat(group) for group in parameters)
    gradients = FP32 * flat if layout.ours and layout.sums else 0
    masters = FP32 * owned if layout.states == FP32 else 0
    return States(size * flat, gradients, masters, moments, 0)


def _stays_whole(parameters: RankParameters) -> int:
    """Elements of small tensors that ZeRO-3 keeps gathered beside their parts."""
    spread = [group for group in parameters if group.copies > 1]
    return sum(size for group in spread for size in group.sizes if size <= PERSISTENT)


class Memory(NamedTuple):
    """Bytes of one rank."""

    states: States
    step_gradients: float  # more gradients, while a step accumulates them
    step_buffers: float  # reduction bucket and its copies, gathered weights
    activations: Activations
    phases: dict[str, float]  # each moment that may be the fullest: bytes then

    @property
    def peak(self) -> float:
        return max(self.phases.values())

    @property
    def fullest(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])


def memory(config: Config, world_size: int, gpu: bool = True) -> Memory:
    """What a rank of `world_size` needs for this configuration.

    Args:
        config: the whole configuration, validated for `world_size`.
        world_size: ranks of the job.
        gpu: False counts what torch's CPU kernels keep, which the tests can run.
    """
    layout = _layout(config, world_size)
    parameters = rank_parameters(config.model, world_size, config.parallel.expert_parallel_size)
    held = states(parameters, layout)
    needed = activations(make_pass(config, fused_norm=gpu))
    gradients = _step_gradients(parameters, layout)
    kept = 0 if layout.ours and layout.sums else gradients  # after backward
    buffers = _step_buffers(parameters, layout)
    reduction = _reduction(parameters, layout)
    during = reduction if layout.stage >= 2 else 0  # ZeRO-2 and 3 reduce as the backward goes
    return Memory(
        states=held,
        step_gradients=gradients,
        step_buffers=buffers + reduction,
        activations=needed,
        phases={
            "building": _building(parameters, layout),
            "forward and backward": held.total + buffers + during + _passes(parameters, layout, needed),
            "gradient reduction": held.total + kept + buffers + reduction,
            "optimizer step": held.total + kept + _stepping(parameters, layout),
        },
    )


def _passes(parameters: RankParameters, layout: Layout, needed: Activations) -> float:
    """Activations and gradients at their fullest moment together."""
    gradients = _step_gradients(parameters, layout)
    if not layout.ours or layout.sums:
        return gradients + needed.peak
    # Gradients of one term come as the layers' tensors go: the head's, or all with the first layer's.
    head = layout.size * max(parameters.decay.sizes)
    return max(needed.kept + needed.logits, needed.layers + head, needed.single + gradients)


def _step_gradients(parameters: RankParameters, layout: Layout) -> float:
    if layout.stage == 3:
        return 0  # their buffer is among the states
    if layout.stage == 2:
        return FP32 * sum(_owned(group, layout.stage) for group in parameters)
    if layout.ours and layout.sums:  # each is freed as soon as it is in its fp32 sum
        return 2 * max(*parameters.decay.sizes, *parameters.experts.sizes)
    return layout.size * parameters.elements


def _step_buffers(parameters: RankParameters, layout: Layout) -> float:
    """What stands by from the first backward of a step on."""
    size = layout.size
    if layout.stage == 0 or layout.ours:
        return 0
    if layout.stage < 3:
        return size * BUCKET
    spread = sum(group.elements for group in parameters if group.copies > 1)
    # A module's tensors are gathered together; of the routed experts that is a whole layer's.
    module = _layer_of_experts(parameters) if parameters.experts.copies > 1 else 0
    largest = max(module, *parameters.decay.sizes)
    return size * min(spread - _stays_whole(parameters), max(LIVE, largest))


def _layer_of_experts(parameters: RankParameters) -> int:
    return sum(parameters.experts.sizes[:2])  # w13 and w2


def _reduction(parameters: RankParameters, layout: Layout) -> float:
    """Copies made while gradients are reduced, at the most."""
    stage, size = layout.stage, layout.size
    decay, experts = parameters.decay, parameters.experts
    if layout.ours:
        # A group's gradients are one flat tensor. Groups that share a bucket are joined first. One process
        # reduces nothing.
        return 0 if decay.elements > BUCKET or decay.copies == 1 else FP32 * parameters.dense
    if stage == 1:
        return 0  # what was copied into the bucket is freed where it came from
    largest = max(*decay.sizes, *experts.sizes)
    if stage == 3:  # experts and the rest alternate and never share a bucket
        bucket = max(largest, min(BUCKET, _layer_of_experts(parameters)))
        return bucket * (size + (FP32 / experts.copies if layout.bf16 else 0))
    return size * min(max(parameters.dense, experts.elements), max(BUCKET, largest))


def _stepping(parameters: RankParameters, layout: Layout) -> float:
    """AdamW's temporaries, where it makes any, and a flat gradient where one is made."""
    stage = layout.stage
    if layout.ours:
        # kernels/reference/adamw.py: a tensor's gradient in fp32; of bf16 states three more, and random bits.
        copies = (1 if layout.sums else 2) if layout.states == FP32 else 1 + 3 + 3 * 2
        return 0 if layout.fused else copies * FP32 * max(_largest_owned(group) for group in parameters)
    # torch's is fused and takes nothing.
    flattened = stage > 0
    largest = max(_owned(group, stage) for group in parameters)
    if stage == 3:
        largest = min(largest, SUB_GROUP + max(parameters.decay.sizes))
    return largest * FP32 * flattened


def _largest_owned(group: Group) -> int:
    """Elements of the longest stretch of one tensor that a rank may own under ZeRO-1."""
    return min(max(group.sizes), _owned(group, 1))


def _building(parameters: RankParameters, layout: Layout) -> float:
    """The model as built, before ZeRO spreads it: a rank's whole share, also under ZeRO-3.

    A matrix is drawn in fp32 and scaled out of place; an expert at a time. ZeRO-1 in bf16 then begins with
    flat weights, its own fp32 masters and whole fp32 gradients.
    """
    built = layout.size * parameters.elements + 2 * FP32 * max(parameters.decay.sizes)
    begun = sum((2 + FP32) * _flat(group) + FP32 * _owned(group, 1) for group in parameters)
    return max(built, begun) if layout.ours else built
