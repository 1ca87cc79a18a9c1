"""DeepSpeed's bf16 ZeRO-1 optimizer with our own step, and states in fp32 or bf16.

DeepSpeed keeps each group's flat weights and their partition over ranks. A group is a bucket: some
neighbouring parameters (`buckets` in buckets.py). This module adds fp32 gradient sums, but only if there
is a second term: another micro-batch, or another rank with the same parameters. As soon as a bucket has its
last term, its sum over ranks begins, while the backward pass continues. Each rank gets its part. The step
takes one norm, then calls `Optimizer.update` once per range. That one pass clips, updates and writes the
model's weights. A bucket's new weights travel to the other ranks while the next buckets are updated.
"""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils.timer import NoopTimer
from torch import Tensor, nn

from dsv2.kernels.sets import KernelSet
from dsv2.optimizers.base import Optimizer, Shard
from dsv2.parallel.mesh import Mesh, MeshDim, Work
from dsv2.parallel.plan import Dim
from dsv2.parallel.zero.base import shards_of
from dsv2.parallel.zero.experts import is_expert
from dsv2.parallel.zero.stage1 import flat_ranges


class _Sum:
    """One bucket's fp32 gradient, summed over micro-batches and then over ranks.

    Args:
        like: the bucket's flat weights.
        sizes: elements of its parameters.
        ranks: the ranks that hold the same parameters.
    """

    def __init__(self, like: Tensor, sizes: list[int], ranks: MeshDim):
        self._flat = torch.zeros_like(like, dtype=torch.float32)  # with zeros as padding
        self._terms = self._flat[: sum(sizes)].split(sizes)
        self._ranks = ranks
        self._missing: set[int] = set()  # parameters without their last term
        self._work: Work | None = None

    def start_last_terms(self) -> None:
        """Expect the last term of each parameter."""
        self._missing = set(range(len(self._terms)))

    def add(self, index: int, gradient: Tensor, *, first: bool, last: bool) -> None:
        """Add a term of one parameter. The last one of the bucket starts the sum over ranks."""
        term = self._terms[index]
        term.copy_(gradient) if first else term.add_(gradient)
        if last:
            self._missing.remove(index)
            if not self._missing:
                self._work = self._ranks.scatter_sum_in_place(self._flat)

    def part(self) -> Tensor:
        """Return this rank's part of the sum over all ranks and micro-batches, fp32 and flat."""
        assert self._work is not None, "the last micro-batch's backward pass has started the sum"
        return self._work.wait()


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
        self.last_micro_batch = False  # does the running backward pass end the step's gradients?
        of_experts = [all(map(is_expert, group)) for group in self.bf16_groups]
        self._ranks = [mesh[Dim.edp if experts else Dim.dp] for experts in of_experts]
        self._sums: list[_Sum | None] = [None] * len(self.bf16_groups)
        self._one_term = [False] * len(self.bf16_groups)  # is the gradient of this step a single term?
        self._shards: list[Shard] = []
        # DeepSpeed has allocated fp32 gradient sums even if they are not needed: free them.
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

    def start_backward(self, *, first: bool, last: bool) -> None:
        """Prepare for the gradients of one micro-batch, which may be the step's first and its last."""
        self.last_micro_batch = last
        if first:
            self.fp32_groups_has_gradients = [[False] * len(group) for group in self.bf16_groups]
            self._one_term = [last and ranks.size == 1 for ranks in self._ranks]
        for index, group in enumerate(self.bf16_groups):
            if self._one_term[index]:
                continue
            if self._sums[index] is None:
                sizes = [parameter.numel() for parameter in group]
                self._sums[index] = _Sum(self.bf16_groups_flat[index], sizes, self._ranks[index])
            if last:
                self._sum(index).start_last_terms()

    def _sum(self, index: int) -> _Sum:
        total = self._sums[index]
        assert total is not None
        return total

    def accumulate_hp_grads_and_remove_lp(self, lp_param: Any, group_idx: int, param_idx: int) -> None:
        """Add a parameter's gradient of a micro-batch; DeepSpeed calls this as soon as it exists."""
        has_gradient = self.fp32_groups_has_gradients[group_idx]
        if not self._one_term[group_idx]:
            self._sum(group_idx).add(
                param_idx,
                lp_param.grad.view(-1),
                first=not has_gradient[param_idx],
                last=self.last_micro_batch,
            )
            lp_param.grad = None
        has_gradient[param_idx] = True

    def get_grads_for_reduction(self) -> Any:
        """Return what DeepSpeed reduces: nothing, because `_Sum` does."""
        return [], {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clip, update, gather. If the norm is not finite, weights and states stay unchanged."""
        # A parameter without a new gradient would be updated with the previous step's gradient, which is
        # still in its sum.
        assert all(map(all, self.fp32_groups_has_gradients)), "every parameter has a gradient in every step"
        parts = [
            None if one_term else self._sum(index).part() for index, one_term in enumerate(self._one_term)
        ]
        # The loss is a mean over a rank's tokens, so the gradient is the mean of the ranks' gradients.
        mean = 1 / self.mesh[Dim.dp].size
        norm = self._norm(parts) * mean
        self._global_grad_norm = norm
        if not self.applies_update:
            return
        scale = (self.clip_grad / (norm + 1e-6)).clamp(max=1.0) if self.clip_grad else torch.ones_like(norm)
        self._update(parts, scale.where(norm.isfinite(), torch.nan) * mean)

    def _norm(self, parts: list[Tensor | None]) -> Tensor:
        """Return the 2-norm of the ranks' summed gradients, fp32 []. No two ranks own the same element."""
        sums = [part for part in parts if part is not None]
        whole = [
            parameter.grad.view(-1)
            for group, part in zip(self.bf16_groups, parts, strict=True)
            if part is None
            for parameter in group
        ]
        squares = [self.kernels.sum_of_squares(tensors) for tensors in (sums, whole) if tensors]
        return self.mesh[Dim.world].sum(torch.stack(squares).sum()).sqrt()

    def _update(self, parts: list[Tensor | None], scale: Tensor) -> None:
        """Update this rank's ranges.

        Args:
            parts: each bucket's gradient of this rank's part; None: the parameters hold it.
        """
        self.steps_done += 1
        remaining = iter(self.shards())
        on_their_way: list[Work] = []
        for index, group in enumerate(self.bf16_groups):
            part = parts[index]
            for parameter in group:
                if parameter._hp_mapping is None:  # another rank owns all of it
                    continue
                within = _slice(parameter._hp_mapping.lp_fragment_address)
                gradient = (
                    parameter.grad.view(-1)[within]
                    if part is None
                    else part[_slice(parameter._hp_mapping.hp_fragment_address)]
                )
                self.rule.update(
                    next(remaining),
                    gradient,
                    weight=None if self.bf16_states else parameter.data.view(-1)[within],
                    scale=scale,
                    settings=self.optimizer.param_groups[index],
                    step=self.steps_done,
                    kernels=self.kernels,
                )
            on_their_way.append(self._ranks[index].gather_in_place(self.bf16_groups_flat[index]))
        for work in on_their_way:
            work.wait()

    def clear_hp_grads(self) -> None:
        """Clear nothing: a step's first gradient is written over the sum."""


def _slice(address: Any) -> slice:
    """Return DeepSpeed's address of a fragment as a slice."""
    return slice(address.start, address.start + address.numel)


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
