"""Time of an optimizer step: arithmetic, then traffic; nothing of it is taken to be hidden.

An estimate from data sheets and two assumed shares, meant to compare layouts. A measured `perf/mfu`,
given to the planner as mfu=..., takes their place. (ZeRO-3 prefetches weights; how much that hides is not
known until it is measured.)
"""

from typing import NamedTuple

from dsv2.config.schema import Config, Precision
from dsv2.model.sizes import flops_per_token
from dsv2.moe.reach import mean_ranks
from dsv2.moe.routers.kinds import router_of
from dsv2.moe.traffic import bytes_per_row
from dsv2.parallel.gpus import Gpu
from dsv2.parallel.zero.stages import find_stage
from dsv2.planner.parameters import rank_parameters

ARITHMETIC = 0.4  # assumed: share of a GPU's peak that the model's arithmetic reaches, traffic aside
LINKS = 0.8  # assumed: share of a link's data sheet rate that collectives reach


class Traffic(NamedTuple):
    """One token's all-to-all in training, over all layers: bytes that its rank sends."""

    ranks: float  # that its experts live on, on average; its own may be among them
    sent: float
    between_machines: float  # of them
    sent_unlimited: float  # were the token's experts anywhere, not in M groups


class Speed(NamedTuple):
    step_s: float
    arithmetic_s: float
    all_to_all_s: float
    states_s: float  # reducing gradients, gathering weights
    mfu: float
    tokens_per_s: float  # of all GPUs
    days: float
    gpu_hours_per_trillion: float


def traffic(config: Config, gpus_per_node: int) -> Traffic:
    """All-to-all of a token at this layout, routed uniformly: a row for each rank that it reaches."""
    model = config.model
    ep = config.parallel.expert_parallel_size
    itemsize = 2 if config.runtime.precision is Precision.bf16 else 4
    row = bytes_per_row(model.hidden_size, model.num_experts_per_tok, itemsize, config.runtime.recompute)
    row *= model.num_hidden_layers - min(model.first_k_dense_replace, model.num_hidden_layers)
    ranks = router_of(model).mean_ranks(model, ep)
    elsewhere = (ep - 1) / ep
    return Traffic(
        ranks=ranks,
        sent=row * ranks * elsewhere,
        between_machines=row * ranks * (1 - min(gpus_per_node, ep) / ep),
        sent_unlimited=row * mean_ranks(model, ep, limited=False) * elsewhere,
    )


def _ring_bandwidth(gpu: Gpu, members: int, stride: int, gpus_per_node: int) -> float:
    """Bytes/s a rank of a ring collective sends, whose members stand `stride` ranks apart."""
    on_a_machine = max(1, min(members, gpus_per_node // stride))
    if on_a_machine == members:
        return gpu.node_bandwidth * LINKS
    return min(gpu.node_bandwidth, on_a_machine * gpu.network_bandwidth) * LINKS


def _states_seconds(config: Config, world_size: int, gpu: Gpu, gpus_per_node: int) -> float:
    """Gradient reduction and weight gathering of one step, one after the other."""
    parallel = config.parallel
    ep = parallel.expert_parallel_size
    size = 2 if config.runtime.precision is Precision.bf16 else 4
    micro_batches = config.optim.batch_size // (config.runtime.micro_batch_size * world_size)
    parameters = rank_parameters(config.model, world_size, ep)
    moved = find_stage(parallel.zero_stage, config.runtime.precision).traffic(micro_batches, size)
    seconds = 0.0
    for elements, members, stride in (
        (parameters.dense, world_size, 1),
        (parameters.experts.elements, world_size // ep, ep),
    ):
        share = (members - 1) / members
        bandwidth = _ring_bandwidth(gpu, members, stride, gpus_per_node)
        seconds += moved * share * elements / bandwidth
    return seconds


def speed(config: Config, world_size: int, gpu: Gpu, gpus_per_node: int, mfu: float | None) -> Speed:
    """Time of a step at the full batch; `mfu` is the whole step's, where it is known."""
    model = config.model
    length = config.data.sequence_length
    step_tokens = config.optim.batch_size * length
    rank_tokens = step_tokens / world_size
    flops = flops_per_token(model, length)
    done = flops
    if config.runtime.recompute:  # each layer's forward once more; the head's is kept
        done += (flops - 6 * model.vocab_size * model.hidden_size) // 3
    arithmetic = rank_tokens * done / (gpu.peak * ARITHMETIC)
    bytes_sent = traffic(config, gpus_per_node)
    within = (bytes_sent.sent - bytes_sent.between_machines) / gpu.node_bandwidth
    between = bytes_sent.between_machines / gpu.network_bandwidth
    all_to_all = rank_tokens * max(within, between) / LINKS
    states = _states_seconds(config, world_size, gpu, gpus_per_node)
    step = arithmetic + all_to_all + states
    if mfu is not None:
        step = rank_tokens * flops / (gpu.peak * mfu)
    rate = step_tokens / step
    return Speed(
        step_s=step,
        arithmetic_s=arithmetic,
        all_to_all_s=all_to_all,
        states_s=states,
        mfu=rate * flops / world_size / gpu.peak,
        tokens_per_s=rate,
        days=config.optim.total_tokens / rate / 86400,
        gpu_hours_per_trillion=1e12 / rate * world_size / 3600,
    )
