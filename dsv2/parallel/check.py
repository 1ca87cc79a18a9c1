"""Checks of the layout: how processes share the batch, the experts and the optimizer's states. No torch."""

from dsv2.config.rules import divisors, refuse, require_positive
from dsv2.config.schema import Config, WatchdogConfig
from dsv2.parallel.plan import Dim, ParallelPlan
from dsv2.parallel.zero.stages import find_stage

COLLECTIVE_TIMEOUT_S = 7200  # torch ends a job whose collective takes longer; the watchdog comes first


def check_layout(config: Config, world_size: int) -> None:
    """Refuse a layout that `world_size` processes cannot have; UserError names the field."""
    ep_size = config.parallel.expert_parallel_size
    require_positive("parallel", config.parallel, ["expert_parallel_size"])
    require_positive("runtime", config.runtime, ["micro_batch_size"])
    if world_size % ep_size:
        refuse(
            "parallel.expert_parallel_size",
            ep_size,
            f"must divide the number of processes, {world_size}: one of {divisors(world_size)}; "
            "or start another number (NPROC=N launch/local.sh, torchrun --nproc_per_node=N; a plan: gpus=N)",
        )
    find_stage(config.parallel.zero_stage, config.runtime.precision).check(config.optim, config.runtime)


def check_watchdog(watchdog: WatchdogConfig) -> None:
    """Refuse limits that torch's own timeout of a collective would always come before."""
    for name in ("limit_s", "slow_limit_s"):
        limit = getattr(watchdog, name)
        if not 0 <= limit <= COLLECTIVE_TIMEOUT_S / 2:
            right = f"must be at least 0 and at most {COLLECTIVE_TIMEOUT_S // 2} s; 0 means no limit"
            refuse(f"watchdog.{name}", limit, right)


def check_batch_sizes(config: Config, world_size: int) -> None:
    """Refuse batches that the ranks cannot share equally; UserError names the field."""
    optim = config.optim
    micro_batch_size = config.runtime.micro_batch_size
    ranks = ParallelPlan.of(config.parallel, world_size).sizes[Dim.dp]
    share = micro_batch_size * ranks
    sizes = {"optim.batch_size": optim.batch_size}
    if optim.batch_size_start is not None:
        sizes["optim.batch_size_start"] = optim.batch_size_start
        sizes["optim.batch_ramp_increment"] = optim.batch_ramp_increment
    for name, size in sizes.items():
        if size % share:
            refuse(
                name,
                size,
                f"must be a multiple of {share} = runtime.micro_batch_size={micro_batch_size} x "
                f"{ranks} processes",
            )
