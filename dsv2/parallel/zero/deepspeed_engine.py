"""Build DeepSpeed's engine. The private names used here are those of DeepSpeed 0.19.8, which is pinned.

DeepSpeed recognises a mixture-of-experts layer by its type (moe/engine_layer.py) and an expert's parameter
by attributes on it. Without both, ZeRO-3 silently averages different experts.
"""

import contextlib
import importlib
import io
import logging
import os
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from dsv2.config.schema import OptimConfig
from dsv2.optimizers.base import Optimizer
from dsv2.parallel.environment import local_processes
from dsv2.parallel.zero.buckets import buckets
from dsv2.parallel.zero.experts import is_expert


def start_deepspeed() -> None:
    """Let DeepSpeed use the running process group."""
    deepspeed_logger.setLevel(logging.WARNING)
    # No compiled operation of DeepSpeed is used. Its shared-memory CPU collectives would be compiled on first
    # use, for minutes. Asking what could be compiled runs a compiler on every rank.
    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    # Without it, DeepSpeed's ZeRO-3 on the CPU runs `numactl` for each bucket of gradients that it reduces.
    os.environ.setdefault("LOCAL_SIZE", str(local_processes()))
    _import_muon()
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def _import_muon() -> None:
    """Import DeepSpeed's Muon as it is, without torch's compiler for it.

    DeepSpeed imports its Muon on every run, to know the optimizer's type. Preparing the compiler for Muon
    takes 1.5 s, and no run uses it.
    """
    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def expert_groups(ep_size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Return this rank's expert-parallel group, and the group of ranks that hold the same experts."""
    groups._create_expert_and_data_parallel(ep_size)
    name = f"ep_size_{ep_size}"
    return groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)


def mark_experts(model: nn.Module) -> None:
    """Mark the parameters of routed experts for DeepSpeed and for `is_expert`, in place."""
    layers = [layer for layer in model.modules() if isinstance(layer, AutoEPMoELayer)]
    assert layers, "the model must be built with moe/engine_layer.py's layer"
    for layer in layers:
        for parameter in layer.experts.parameters():
            mark: Any = parameter
            mark.allreduce = False  # reduced over the expert-data group, not over all ranks
            mark.group_name = layer.ep_group_name
            mark.ds_zero_placement_family = "autoep_expert"
            mark.ds_zero_partition_group_name = layer.ep_group_name
            mark.expert_rank = layer.ep_rank
            mark.expert_ranks = layer.ep_size


def build_optimizer(
    model: nn.Module, optimizer: Optimizer, optim: OptimConfig, bucket: int | None
) -> torch.optim.Optimizer:
    """Return torch's optimizer with its groups as DeepSpeed expects them.

    Args:
        bucket: the elements of a group, as in `buckets`; None: one group per rule.
    """
    experts = [parameter for parameter in model.parameters() if is_expert(parameter)]
    dense = [parameter for parameter in model.parameters() if not is_expert(parameter)]
    built = []
    for group in optimizer.groups(dense, experts, optim):
        for part in buckets([parameter.numel() for parameter in group.parameters], bucket):
            settings: dict[str, Any] = {
                "name": group.name,
                "rule": group.name,
                "params": group.parameters[part],
                "weight_decay": group.weight_decay,
            }
            if group.parameters and is_expert(group.parameters[0]):
                first: Any = group.parameters[0]
                settings["moe"] = True
                settings["name"] = first.group_name  # DeepSpeed finds the process group by it
            built.append(settings)
    return optimizer.build(built, optim)


def make_engine(
    model: nn.Module,
    optimizer: Optimizer,
    optim: OptimConfig,
    initialize: Callable[..., Any],
    settings: dict[str, Any],
    bucket: int | None = None,
) -> Any:
    """Return DeepSpeed's engine over a freshly built model. Collective.

    Args:
        bucket: the elements of a parameter group, as in `buckets`; None: one group per rule.
    """
    mark_experts(model)
    built = build_optimizer(model, optimizer, optim, bucket)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints the memory after each parameter group
        return initialize(model=model, optimizer=built, config=settings)


def deepspeed_engine(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """Return DeepSpeed's own engine."""
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine
