"""Refuse values and combinations that cannot run, before anything starts: the list of who is asked."""

from dsv2.config.schema import Config
from dsv2.config.sections import (
    check_checkpoint,
    check_eval,
    check_logging,
    check_profile,
    check_run,
    check_schedule,
    check_spike,
)
from dsv2.model.check import check_kernels, check_model
from dsv2.moe.check import check_experts, check_experts_of_ranks
from dsv2.optimizers.rules import find_optimizer
from dsv2.parallel.check import check_batch_sizes, check_layout, check_watchdog
from dsv2.training.schedule import check_warmup


def validate(config: Config, world_size: int) -> None:
    """Refuse a configuration that cannot run, before any process group or model exists.

    Args:
        config: the whole configuration.
        world_size: number of processes of the job.

    Raises:
        UserError: names the field, its value and what would be right.
    """
    from data.streams.sources import check_config  # not above: it imports numpy, which --help does not need

    check_model(config.model)
    check_experts(config.model)
    find_optimizer(config.optim.name).check(config.optim)
    check_schedule(config.optim, config.data.sequence_length)
    check_layout(config)
    check_experts_of_ranks(config.model, config.parallel.expert_parallel_size, world_size)
    check_kernels(config.model, config.runtime)
    check_batch_sizes(config, world_size)
    check_config(config.data)
    check_run(config)
    check_spike(config.spike)
    check_logging(config.logging)
    check_profile(config.profile, world_size, config.stop_step)
    check_watchdog(config.watchdog)
    check_eval(config.eval)
    check_checkpoint(config.checkpoint)
    check_warmup(config.optim, config.data.sequence_length)
