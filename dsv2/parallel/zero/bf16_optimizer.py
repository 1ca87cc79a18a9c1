"""DeepSpeed's bf16 ZeRO-1 optimizer with our own step, and states in fp32 or bf16.

DeepSpeed keeps the groups' flat weights and their partition over ranks, reduces gradients and gathers new
weights. This module adds fp32 gradient sums, but only if there is a second term: another micro-batch or
another rank. Its step takes one norm, then calls `Optimizer.update` once per parameter. That one pass
clips, updates and writes the model's weights.
"""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.utils.timer import NoopTimer
from torch import Tensor, nn

from dsv2.kernels.sets import KernelSet
from dsv2.optimizers.base import Optimizer, Shard
from dsv2.parallel.mesh import Mesh
from dsv2.parallel.plan import Dim
from dsv2.parallel.zero.base import shards_of
from dsv2.parallel.zero.experts import is_expert
from dsv2.parallel.zero.stage1 import flat_ranges


class ZeRO1BF16(BF16_Optimizer):
    """The optimizer that the module's docstring describes.

    Args:
        bf16_states: whether to update the model's own weights, without fp32 masters.
        deepspeed: the arguments of BF16_Optimizer.
    """

    def __init__(
        self, mesh: Mesh, rule: Optimizer, kernels: KernelSet, *, bf16_states: bool, **deepspeed: Any
    ):
        super().__init__(**deepspeed)
        self.mesh = mesh
        self.rule = rule
        self.kernels = kernels
        self.bf16_states = bf16_states
        self.steps_done = 0
        self.applies_update = True  # False: the next step only computes the norm
        self._one_term = False  # does a step have one micro-batch on one rank?
        self._expert_group = [all(map(is_expert, group)) for group in self.bf16_groups]
        self._shards: list[Shard] = []
        # DeepSpeed has allocated fp32 gradient sums even if they are not needed: free them.
        self._sums: list[list[Tensor]] = []
        self.fp32_groups_gradients = []
        self.fp32_groups_gradients_flat = []
        self.fp32_groups_actual_gradients_flat = []
        self.fp32_groups_gradient_flat_partition = []
        self.fp32_groups_gradient_dict.clear()
        self.non_expert_gradients = []
        self.expert_gradients = {name: [] for name in self.expert_gradients}
        if bf16_states:
            for index, group in enumerate(self.optimizer.param_groups):
                rank = dist.get_rank(group=self.real_dp_process_group[index])
                weights = self.bf16_partitioned_groups[index][rank]
                self.fp32_groups_flat_partition[index] = weights
                group["params"] = [weights]
        self._link_all_hp_params()

    def shards(self) -> list[Shard]:
        """Return this rank's ranges, in the order of `bf16_groups`. The first call makes the states."""
        if not self._shards:
            names = {id(parameter): name for parameter, name in self.param_names.items()}
            ranges = flat_ranges(self.fp32_groups_flat_partition, self.bf16_groups, names)
            self._shards = list(shards_of(ranges, self.optimizer, self.rule))
        return self._shards

    def start_step(self, *, one_micro_batch: bool) -> None:
        """Prepare for the first gradients of a step."""
        self._one_term = one_micro_batch and self.mesh[Dim.dp].size == 1
        if not self._one_term and not self._sums:
            self._make_sums()
        self.fp32_groups_has_gradients = [[False] * len(group) for group in self.bf16_groups]

    def _make_sums(self) -> None:
        for index, group in enumerate(self.bf16_groups):
            flat = torch.zeros_like(self.bf16_groups_flat[index], dtype=torch.float32)
            self._sums.append(self._split_flat_tensor(flat, [p.numel() for p in group]))
            if self._expert_group[index]:
                self.expert_gradients[self.optimizer.param_groups[index]["name"]].append(flat)
            else:
                self.non_expert_gradients.append(flat)

    def accumulate_hp_grads_and_remove_lp(self, lp_param: Any, group_idx: int, param_idx: int) -> None:
        """Add a parameter's gradient of a micro-batch; DeepSpeed calls this as soon as it exists."""
        has_gradient = self.fp32_groups_has_gradients[group_idx]
        if not self._one_term:
            total = self._sums[group_idx][param_idx]
            gradient = lp_param.grad.view(-1)
            total.add_(gradient) if has_gradient[param_idx] else total.copy_(gradient)
            lp_param.grad = None
        has_gradient[param_idx] = True

    def get_grads_for_reduction(self) -> Any:
        """Return what DeepSpeed reduces: nothing with one rank."""
        return ([], {}) if self.mesh[Dim.dp].size == 1 else super().get_grads_for_reduction()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clip, update, gather. If the norm is not finite, weights and states stay unchanged."""
        # A parameter without a new gradient would be updated with the previous step's gradient, which is
        # still in its sum.
        assert all(map(all, self.fp32_groups_has_gradients)), "every parameter has a gradient in every step"
        gradients = self._gradients()
        dense: list[Tensor] = []
        experts: list[Tensor] = []
        for group, of_experts in zip(gradients, self._expert_group, strict=True):
            (experts if of_experts else dense).extend(group)
        squares = (self.kernels.sum_of_squares(tensors) for tensors in (dense, experts))
        norm = self.mesh.gradient_norm(*squares)
        self._global_grad_norm = norm
        if not self.applies_update:
            return
        scale = (self.clip_grad / (norm + 1e-6)).clamp(max=1.0) if self.clip_grad else torch.ones_like(norm)
        self._update(gradients, scale.where(norm.isfinite(), torch.nan))
        if self.mesh[Dim.dp].size > 1:
            all_gather_dp_groups(
                groups_flat=self.bf16_groups_flat,
                partitioned_param_groups=self.bf16_partitioned_groups,
                dp_process_group=self.real_dp_process_group,
                start_alignment_factor=self.nccl_start_alignment_factor,
                allgather_bucket_size=self.allgather_bucket_size,
            )

    def _gradients(self) -> list[list[Tensor]]:
        """Return every parameter's gradient, flat, by group."""
        if self._one_term:
            return [[p.grad.view(-1) for p in group] for group in self.bf16_groups]
        return self._sums

    def _update(self, gradients: list[list[Tensor]], scale: Tensor) -> None:
        self.steps_done += 1
        remaining = iter(self.shards())
        for index, group in enumerate(self.bf16_groups):
            for parameter, gradient in zip(group, gradients[index], strict=True):
                if parameter._hp_mapping is None:  # another rank owns all of it
                    continue
                address = parameter._hp_mapping.lp_fragment_address
                owned = slice(address.start, address.start + address.numel)
                self.rule.update(
                    next(remaining),
                    gradient[owned],
                    weight=None if self.bf16_states else parameter.data.view(-1)[owned],
                    scale=scale,
                    settings=self.optimizer.param_groups[index],
                    step=self.steps_done,
                    kernels=self.kernels,
                )

    def clear_hp_grads(self) -> None:
        """Clear nothing: a step's first gradient is written over the sum."""


class BF16Engine(DeepSpeedEngine):
    """DeepSpeed's engine with `ZeRO1BF16` as its optimizer.

    Args:
        model: freshly built.
        optimizer: torch's optimizer over the model's parameters.
        config: DeepSpeed's configuration.
        step: the arguments of ZeRO1BF16, except DeepSpeed's.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], **step: Any
    ):
        self._step_arguments = step
        parsed = DeepSpeedConfig(config)
        super().__init__(args=None, model=model, optimizer=optimizer, config=config, config_class=parsed)

    def _configure_bf16_optimizer(self, optimizer: torch.optim.Optimizer) -> ZeRO1BF16:
        settings: Any = self._config
        return ZeRO1BF16(
            **self._step_arguments,
            init_optimizer=optimizer,
            param_names=self.param_names,
            bfloat16_config=settings.bfloat16_config,
            clip_grad=self.gradient_clipping(),
            allgather_bucket_size=self.zero_allgather_bucket_size(),
            timers=NoopTimer(),
            dp_process_group=self.seq_data_parallel_group,
            grad_acc_dtype=torch.float32,
            has_moe_layers=self.has_moe_layers,
        )
