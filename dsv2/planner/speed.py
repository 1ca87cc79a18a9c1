"""Estimate the time of an optimizer step: arithmetic plus communication, as if the two never overlapped.

The estimate uses data sheets and two assumed shares, and is meant for comparing layouts. A measured
`perf/mfu`, passed to the planner as mfu=SHARE, replaces the estimate. (ZeRO-3 prefetches weights. How much
communication this hides is unknown until it is measured.)
"""

from typing import NamedTuple

from dsv2.config.schema import Config, Precision
from dsv2.model.sizes import flops_per_token
from dsv2.moe.reach import mean_ranks
from dsv2.moe.routers.kinds import router_of
from dsv2.moe.traffic import bytes_per_row
from dsv2.parallel.gpus import Gpu
from dsv2.parallel.plan import Dim, ParallelPlan
from dsv2.parallel.zero.stages import find_stage
from dsv2.planner.parameters import rank_parameters

ARITHMETIC = 0.4  # assumed: the share of a GPU's peak that the model reaches, communication not counted
LINKS = 0.8  # assumed: the share of a link's data sheet rate that collectives reach


class Traffic(NamedTuple):
    """Holds what the all-to-all sends for one token of training, over all layers."""

    ranks: float  # mean number of ranks with the token's experts; the token's own rank may be one of them
    sent: float  # bytes to all other ranks
    between_machines: float  # bytes of `sent` that go to other machines
    sent_unlimited: float  # what `sent` would be if the token's experts were not limited to M groups


class Speed(NamedTuple):
    """Holds the time of a step and of the whole run."""

    step_s: float
    arithmetic_s: float
    all_to_all_s: float
    states_s: float  # for reducing gradients and gathering weights
    mfu: float
    tokens_per_s: float  # of all GPUs together
    days: float
    gpu_hours_per_trillion: float


def traffic(config: Config, gpus_per_node: int) -> Traffic:
    """Return a token's all-to-all traffic on this layout.

    Routing is taken to be uniform. A token sends one row to each rank that holds any of its experts.
    """
    model = config.model
    ep = config.parallel.expert_parallel_size
    itemsize = 2 if config.runtime.precision is Precision.bf16 else 4
    row = bytes_per_row(model.hidden_size, model.num_experts_per_tok, itemsize, config.runtime.recompute)
    row *= model.num_hidden_layers - min(model.first_k_dense_replace, model.num_hidden_layers)
    ranks = router_of(model).mean_ranks(model, ep)
    share_elsewhere = (ep - 1) / ep
    return Traffic(
        ranks=ranks,
        sent=row * ranks * share_elsewhere,
        between_machines=row * ranks * (1 - min(gpus_per_node, ep) / ep),
        sent_unlimited=row * mean_ranks(model, ep, limited=False) * share_elsewhere,
    )


def _ring_bandwidth(gpu: Gpu, members: int, stride: int, gpus_per_node: int) -> float:
    """Return the bytes/s that each rank of a ring collective sends; its members are `stride` ranks apart."""
    members_per_machine = max(1, min(members, gpus_per_node // stride))
    if members_per_machine == members:
        return gpu.node_bandwidth * LINKS
    return min(gpu.node_bandwidth, members_per_machine * gpu.network_bandwidth) * LINKS


def _states_seconds(config: Config, world_size: int, gpu: Gpu, gpus_per_node: int) -> float:
    """Return the seconds per step for reducing gradients and then gathering weights."""
    parallel = config.parallel
    layout = ParallelPlan.of(parallel, world_size)
    dp_size = layout.sizes[Dim.dp]
    itemsize = 2 if config.runtime.precision is Precision.bf16 else 4
    micro_batches = config.optim.batch_size // (config.runtime.micro_batch_size * dp_size)
    parameters = rank_parameters(config.model, layout)
    bytes_per_element = find_stage(parallel.zero_stage, config.runtime.precision).traffic(
        micro_batches, itemsize
    )
    seconds = 0.0
    for elements, members, stride in (
        (parameters.dense, dp_size, 1),
        (parameters.experts.elements, layout.sizes[Dim.edp], layout.ep),
    ):
        share_sent = (members - 1) / members
        bandwidth = _ring_bandwidth(gpu, members, stride, gpus_per_node)
        seconds += bytes_per_element * share_sent * elements / bandwidth
    return seconds


def speed(config: Config, world_size: int, gpu: Gpu, gpus_per_node: int, mfu: float | None) -> Speed:
    """Return the time of a step of the full batch.

    Args:
        mfu: measured over the whole step; None estimates the time.
    """
    model = config.model
    length = config.data.sequence_length
    step_tokens = config.optim.batch_size * length
    rank_tokens = step_tokens / world_size
    flops = flops_per_token(model, length)
    executed_flops = flops
    if config.runtime.recompute:  # each layer repeats its forward pass; the head does not
        executed_flops += (flops - 6 * model.vocab_size * model.hidden_size) // 3
    arithmetic = rank_tokens * executed_flops / (gpu.peak * ARITHMETIC)
    bytes_sent = traffic(config, gpus_per_node)
    within_s = (bytes_sent.sent - bytes_sent.between_machines) / gpu.node_bandwidth
    between_s = bytes_sent.between_machines / gpu.network_bandwidth
    all_to_all = rank_tokens * max(within_s, between_s) / LINKS
    states = _states_seconds(config, world_size, gpu, gpus_per_node)
    step = arithmetic + all_to_all + states
    if mfu is not None:
        step = rank_tokens * flops / (gpu.peak * mfu)
    tokens_per_s = step_tokens / step
    return Speed(
        step_s=step,
        arithmetic_s=arithmetic,
        all_to_all_s=all_to_all,
        states_s=states,
        mfu=tokens_per_s * flops / world_size / gpu.peak,
        tokens_per_s=tokens_per_s,
        days=config.optim.total_tokens / tokens_per_s / 86400,
        gpu_hours_per_trillion=1e12 / tokens_per_s * world_size / 3600,
    )
