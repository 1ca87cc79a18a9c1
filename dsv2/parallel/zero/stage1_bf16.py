"""DeepSpeed's bf16 ZeRO-1 optimizer with its step in one pass, and its states in fp32 or bf16.

DeepSpeed keeps: the groups' flat weights and their partition over ranks, the reduction of gradients, the
gathering of new weights. Ours: sums of gradients in fp32 only where there is a second term (another
micro-batch, another rank), one norm, and one pass a parameter of `kernels.adamw`, which clips, updates
and writes the model's weights.
"""

import zlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import all_gather_dp_groups
from torch import Tensor

from dsv2.config.schema import Precision
from dsv2.kernels.reference.adamw import AdamWStep
from dsv2.kernels.sets import KernelSet
from dsv2.parallel.mesh import Mesh
from dsv2.parallel.plan import Dim
from dsv2.parallel.zero.base import AnyEngine, Fragment, fragments, is_expert


class _Piece(NamedTuple):
    """What this rank updates of one parameter."""

    group: int
    index: int  # of the parameter within its group
    start: int  # first element within the parameter as it stands on this rank
    fragment: Fragment


class ZeRO1BF16(BF16_Optimizer):
    """See the file's head. `take_over` makes one of the optimizer that DeepSpeed has built."""

    mesh: Mesh
    kernels: KernelSet
    states: Precision
    one_term: bool  # is a rank's gradient the sum of one micro-batch, and of no other rank?

    def prepare(self, engine: AnyEngine, mesh: Mesh, kernels: KernelSet, states: Precision) -> None:
        """Plays the part of a constructor."""
        self.mesh, self.kernels, self.states = mesh, kernels, states
        self.one_term = False
        self._expert_group = [all(map(is_expert, group)) for group in self.bf16_groups]
        # DeepSpeed's own gradient sums are there from the start, needed or not.
        self._sums: list[list[Tensor]] = []
        self.fp32_groups_gradients, self.fp32_groups_gradients_flat = [], []
        self.fp32_groups_actual_gradients_flat, self.fp32_groups_gradient_flat_partition = [], []
        self.fp32_groups_gradient_dict.clear()
        self.non_expert_gradients, self.expert_gradients = [], {name: [] for name in self.expert_gradients}
        if states is Precision.bf16:  # the model's own weights are the ones to update
            for index, group in enumerate(self.optimizer.param_groups):
                rank = dist.get_rank(group=self.real_dp_process_group[index])
                own = self.bf16_partitioned_groups[index][rank]
                self.fp32_groups_flat_partition[index] = own
                group["params"] = [own]
        self._link_all_hp_params()
        held = [
            (i, j, parameter._hp_mapping.lp_fragment_address.start)
            for i, group in enumerate(self.bf16_groups)
            for j, parameter in enumerate(group)
            if parameter._hp_mapping is not None
        ]
        self._pieces = [_Piece(*own, part) for own, part in zip(held, fragments(engine), strict=True)]

    def expect(self, micro_batches: int) -> None:
        """Before a step of so many micro-batches."""
        self.one_term = micro_batches == 1 and self.mesh[Dim.dp].size == 1
        if not self.one_term and not self._sums:
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
        """Called as soon as a parameter's gradient of a micro-batch is there."""
        has_gradient = self.fp32_groups_has_gradients[group_idx]
        if not self.one_term:
            total, gradient = self._sums[group_idx][param_idx], lp_param.grad.view(-1)
            total.add_(gradient) if has_gradient[param_idx] else total.copy_(gradient)
            lp_param.grad = None
        has_gradient[param_idx] = True

    def get_grads_for_reduction(self) -> Any:
        """One rank reduces nothing."""
        return ([], {}) if self.mesh[Dim.dp].size == 1 else super().get_grads_for_reduction()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clip, update, gather. A norm that is not finite leaves weights and moments as they are."""
        # A sum still holds the step before's, which would be taken for a gradient.
        assert all(map(all, self.fp32_groups_has_gradients)), "every parameter has a gradient in every step"
        gradients = self._gradients()
        expert, dense = (
            [g for group, of in zip(gradients, self._expert_group, strict=True) if of is is_of for g in group]
            for is_of in (True, False)
        )
        squares = (self.kernels.sum_of_squares(grads) for grads in (dense, expert))
        self._global_grad_norm = norm = self.mesh.gradient_norm(*squares)
        scale = (self.clip_grad / (norm + 1e-6)).clamp(max=1.0) if self.clip_grad else torch.ones_like(norm)
        self._update(scale.where(norm.isfinite(), torch.nan))
        if self.mesh[Dim.dp].size > 1:
            all_gather_dp_groups(
                groups_flat=self.bf16_groups_flat,
                partitioned_param_groups=self.bf16_partitioned_groups,
                dp_process_group=self.real_dp_process_group,
                start_alignment_factor=self.nccl_start_alignment_factor,
                allgather_bucket_size=self.allgather_bucket_size,
            )

    def _gradients(self) -> list[list[Tensor]]:
        """Every parameter's, flat, by group."""
        if self.one_term:
            return [[p.grad.view(-1) for p in group] for group in self.bf16_groups]
        return self._sums

    def _update(self, scale: Tensor) -> None:
        for owner in self.fp32_groups_flat_partition:
            state = self.optimizer.state[owner]
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment not in state:
                    state[moment] = torch.zeros_like(owner.detach())
            state["step"] = state.get("step", torch.tensor(0.0)) + 1  # on the host
        gradients = self._gradients()
        for i, j, start, fragment in self._pieces:
            group, state = self.optimizer.param_groups[i], self.optimizer.state[fragment.owner]
            hyper = AdamWStep(
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=int(state["step"]),
                seed=zlib.crc32(fragment.name.encode()) >> 1,
            )
            stretch = slice(start, start + fragment.length)
            separate = self.states is Precision.fp32
            self.kernels.adamw(
                *(fragment.view(x) for x in (fragment.owner, state["exp_avg"], state["exp_avg_sq"])),
                gradients[i][j][stretch],
                scale,
                self.bf16_groups[i][j].data.view(-1)[stretch] if separate else None,
                hyper,
                fragment.offset,
            )

    def clear_hp_grads(self) -> None:
        """Nothing to clear: a step's first gradient is written over the sum."""


def take_over(engine: AnyEngine, mesh: Mesh, kernels: KernelSet, states: Precision) -> None:
    """Make a fresh engine's bf16 ZeRO-1 optimizer ours; other optimizers stay as they are."""
    optimizer: Any = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        ours: Any = optimizer
        ours.__class__ = ZeRO1BF16
        ours.prepare(engine, mesh, kernels, states)


def expect(engine: AnyEngine, micro_batches: int) -> None:
    """Tell the engine's optimizer how many micro-batches the coming step has."""
    if isinstance(engine.optimizer, ZeRO1BF16):
        engine.optimizer.expect(micro_batches)
