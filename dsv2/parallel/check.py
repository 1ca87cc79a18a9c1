"""Checks of the layout: how processes share the batch, the experts and the optimizer's states. No torch."""

from dsv2.config.rules import refuse, require_positive
from dsv2.config.schema import Config, Device, ExpertExchange, RuntimeConfig, WatchdogConfig
from dsv2.kernels.specs import find_spec
from dsv2.parallel.plan import Dim, ParallelPlan
from dsv2.parallel.zero.stages import find_stage

COLLECTIVE_TIMEOUT_S = 7200  # torch ends a job whose collective takes longer; the watchdog comes first


def check_layout(config: Config) -> None:
    """Refuse a layout that cannot run; UserError names the field. moe/check.py checks the experts' layout."""
    require_positive("parallel", config.parallel, ["expert_parallel_size"])
    require_positive("runtime", config.runtime, ["micro_batch_size"])
    if config.parallel.expert_exchange is ExpertExchange.symmetric:
        _check_symmetric(config.runtime)
    find_stage(config.parallel.zero_stage, config.runtime.precision).check(config.optim, config.runtime)


def _check_symmetric(runtime: RuntimeConfig) -> None:
    if runtime.device is Device.cpu or not find_spec(runtime.kernels).is_fused:
        right = (
            f"needs GPUs and fused kernels, not runtime.device={runtime.device.value} and "
            f"runtime.kernels={runtime.kernels}; use collective"
        )
        refuse("parallel.expert_exchange", "symmetric", right)


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
