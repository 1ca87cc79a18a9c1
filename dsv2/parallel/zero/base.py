"""DeepSpeed's privates (pinned to 0.19.8 in requirements.txt); only deepspeed_bf16.py touches more of them.

DeepSpeed's engine recognises a mixture of experts by isinstance, and treats a parameter as an expert
by attributes on it. `adopt` makes our layer one that it recognises; `fragments` finds what each rank
owns of the fp32 weights and of Adam's moments under every ZeRO stage.
"""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from dsv2.moe.layer import MoELayer
from dsv2.parallel.mesh import Mesh
from dsv2.parallel.plan import Dim

AnyEngine = Any  # deepspeed.DeepSpeedEngine; its own annotations do not hold


class EngineMoELayer(MoELayer, AutoEPMoELayer):
    """Our layer under a type that DeepSpeed's engine takes for a mixture of experts, ZeRO-3 included."""

    def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """The groups were passed in at construction."""


def start_deepspeed() -> None:
    """Let DeepSpeed use the running process group."""
    deepspeed_logger.setLevel(logging.WARNING)
    # Its shared-memory CPU collectives would be compiled on first use, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def expert_groups(ep_size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Return this rank's two groups: sharing one copy of the experts, and holding the same experts."""
    groups._create_expert_and_data_parallel(ep_size)
    name = _group_name(ep_size)
    return groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)


def _group_name(ep_size: int) -> str:
    return f"ep_size_{ep_size}"


def is_expert(parameter: nn.Parameter) -> bool:
    """Is it a routed expert's, as `adopt` marked it?"""
    return not getattr(parameter, "allreduce", True)


def adopt(model: nn.Module, mesh: Mesh) -> None:
    """Mark every MoE layer of a freshly built model for DeepSpeed's engine, in place.

    Without the type and the marks ZeRO-3 silently averages different experts.
    """
    ep = mesh[Dim.ep]
    name = _group_name(ep.size)
    for layer in model.modules():
        if not isinstance(layer, MoELayer):
            continue
        layer.__class__ = EngineMoELayer
        attributes: Any = layer  # what the engine reads of an AutoEPMoELayer
        attributes.num_experts = layer.experts.n_experts
        attributes.num_local_experts = layer.experts.n_local
        attributes.ep_size = ep.size
        attributes.ep_rank = ep.rank
        attributes.ep_group_name = name
        for parameter in layer.experts.parameters():
            mark: Any = parameter
            mark.allreduce = False  # reduced over the expert-data group, not over all ranks
            mark.group_name = name
            mark.ds_zero_placement_family = "autoep_expert"
            mark.ds_zero_partition_group_name = name


def parameter_groups(model: nn.Module, mesh: Mesh, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: decayed matrices, undecayed norms, and the routed experts on their own."""
    dense = [p for p in model.parameters() if not is_expert(p)]
    return [
        {"name": "decay", "params": [p for p in dense if p.ndim > 1], "weight_decay": weight_decay},
        {"name": "no_decay", "params": [p for p in dense if p.ndim <= 1], "weight_decay": 0.0},
        {
            # For an expert group DeepSpeed looks the process group up by this name.
            "name": _group_name(mesh[Dim.ep].size),
            "params": [p for p in model.parameters() if is_expert(p)],
            "weight_decay": weight_decay,
            "moe": True,
        },
    ]


class Fragment(NamedTuple):
    """What this rank owns of one parameter: a contiguous range of the flattened whole parameter."""

    name: str  # the parameter's name in the model
    offset: int  # first element, in the whole parameter with all experts
    total: int  # elements of the whole parameter
    owner: Tensor  # the optimizer's own parameter that holds it; the key of its state
    start: int  # first element within `owner`
    length: int

    def view(self, tensor: Tensor) -> Tensor:
        """The fragment's part of `owner` or of a state tensor shaped like it, 1-D, sharing memory."""
        return tensor.detach().view(-1).narrow(0, self.start, self.length)


def fragments(engine: AnyEngine) -> Iterator[Fragment]:
    """Every range of fp32 weights that this rank's optimizer updates, under any ZeRO stage.

    Expert parallelism cuts dim 0, so an expert's range within the whole parameter is contiguous too.
    """
    names = {id(p): name for name, p in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    optimizer: Any = engine.optimizer

    def place(parameter: Any, numel: int) -> tuple[int, int]:
        if not is_expert(parameter):
            return 0, numel
        rank = groups._get_expert_parallel_rank(parameter.group_name)
        return rank * numel, groups._get_expert_parallel_world_size(parameter.group_name) * numel

    if stage == 0:
        for parameter in engine.module.parameters():
            base, total = place(parameter, parameter.numel())
            yield Fragment(names[id(parameter)], base, total, parameter, 0, parameter.numel())
    elif stage == 3:
        for parameter in engine.module.parameters():
            group, start, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
            base, total = place(parameter, parameter.ds_numel)
            first = dist.get_rank(parameter.ds_process_group) * padded
            length = min(padded, parameter.ds_numel - first)  # the last ranks' ranges end in padding
            if length > 0:
                owner = optimizer.fp32_partitioned_groups_flat[group]
                yield Fragment(names[id(parameter)], base + first, total, owner, start, length)
    else:
        if hasattr(optimizer, "bf16_groups"):
            owners, members = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
        else:
            owners, members = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
        for owner, group in zip(owners, members, strict=True):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is None:  # another rank owns all of it
                    continue
                base, total = place(parameter, parameter.numel())
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Fragment(names[id(parameter)], base + low.start, total, owner, high.start, high.numel)


def base_optimizer(engine: AnyEngine) -> torch.optim.Optimizer:
    """The torch optimizer under ZeRO's wrapper; its state is keyed by `Fragment.owner`."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def refresh_model_weights(engine: AnyEngine) -> None:
    """Bring the model's weights up to date with the optimizer's fp32 ones after those were loaded."""
    optimizer: Any = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return  # the optimizer holds the model's own parameters
    if stage < 3:
        optimizer.update_lp_params()
        optimizer._hp_optimizer_states_linked = False
        return
    for index, owner in enumerate(optimizer.fp32_partitioned_groups_flat):
        flat = optimizer.fp16_partitioned_groups_flat[index]
        flat.data.copy_(owner.data)
        partitions = optimizer.fp16_partitioned_groups[index]
        for partition, part in zip(partitions, optimizer.unflatten(flat, partitions), strict=True):
            partition.data = part.data
    if optimizer.persistent_parameters:
        # Small parameters stay gathered between steps; gather them anew from their parts.
        first = optimizer.persistent_parameters[0]
        first.partition(optimizer.persistent_parameters)
        first.all_gather(optimizer.persistent_parameters)
