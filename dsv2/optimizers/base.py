"""The interface of an optimizer: its update rule, its state and its parameter groups.

The learning rate of a step comes from training/schedule.py, and the partition over ranks from parallel/zero.
Validation and the planner use this module without torch, so it imports torch only inside functions.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from dsv2.config.schema import OptimConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dsv2.kernels.sets import KernelSet


class GroupSizes(NamedTuple):
    """The tensors of one parameter group on one rank."""

    sizes: list[int]  # elements of each tensor
    copies: int  # ranks that hold the same tensors; ZeRO partitions over them

    @property
    def elements(self) -> int:
        return sum(self.sizes)


class RankParameters(NamedTuple):
    """One rank's tensors by parameter group; the field names are the groups' names."""

    decay: GroupSizes  # matrices outside the routed experts
    no_decay: GroupSizes  # norms
    experts: GroupSizes  # this rank's routed experts

    @property
    def elements(self) -> int:
        return sum(group.elements for group in self)

    @property
    def dense(self) -> int:
        """Return the number of elements of all tensors outside the routed experts."""
        return self.decay.elements + self.no_decay.elements


class ParameterGroup(NamedTuple):
    """Parameters that are updated by the same rule."""

    name: str  # a field of RankParameters
    parameters: "list[nn.Parameter]"
    weight_decay: float


class Shard(NamedTuple):
    """One rank's contiguous range of one flattened tensor of the whole model."""

    name: str  # in the model
    offset: int  # of its first element, in the whole tensor with all experts
    total: int  # elements of the whole tensor
    tensors: "dict[str, Tensor]"  # 1-D views by key: "fp32" and the optimizer's states, or only "buffer"


class Optimizer(ABC):
    """One optimizer; optimizers/rules.py lists them all."""

    name: str  # the value of optim.name
    counts_steps: bool  # does torch's optimizer keep a "step" per parameter?

    @abstractmethod
    def check(self, optim: OptimConfig) -> None:
        """Refuse settings that this optimizer cannot use.

        Raises:
            UserError: names the field, its value and what would be right.
        """

    @abstractmethod
    def state_names(self, group: str) -> tuple[str, ...]:
        """Return the names of the states kept per parameter of the group; each has the parameter's size."""

    @abstractmethod
    def update_copies(self, *, bf16_states: bool, fp32_gradient: bool) -> int:
        """Return how many fp32 copies of a tensor `update` makes with the reference kernels."""

    @abstractmethod
    def build(self, groups: list[dict[str, Any]], optim: OptimConfig) -> "torch.optim.Optimizer":
        """Return torch's optimizer for these groups. Each group contains its own `weight_decay`."""

    @abstractmethod
    def update(
        self,
        shard: Shard,
        gradient: "Tensor",
        *,
        weight: "Tensor | None",
        scale: "Tensor",
        settings: dict[str, Any],
        step: int,
        kernels: "KernelSet",
    ) -> None:
        """Update a shard in place, in ZeRO stages that do not use torch's optimizer.

        Args:
            shard: weights and states, fp32, or bf16 with optim.states=bf16.
            gradient: of the shard, fp32 or bf16.
            weight: the model's bf16 weights, also written; None if the shard holds them.
            scale: fp32 [], multiplies the gradient. If it is NaN, nothing is changed.
            settings: the group's settings, as in torch's `param_groups`.
            step: the number of this update, counted from 1.
            kernels: the model's operations.
        """

    def groups(
        self, dense: "Iterable[nn.Parameter]", experts: "Iterable[nn.Parameter]", optim: OptimConfig
    ) -> list[ParameterGroup]:
        """Return the groups, in the order of RankParameters. Weight decay is for matrices only."""
        dense = list(dense)
        decay = optim.weight_decay
        return [
            ParameterGroup("decay", [p for p in dense if p.ndim > 1], decay),
            ParameterGroup("no_decay", [p for p in dense if p.ndim <= 1], 0.0),
            ParameterGroup("experts", list(experts), decay),
        ]

    def steps_done(self, built: "torch.optim.Optimizer") -> float:
        """Return how many steps torch's optimizer has counted; 0 if its rule counts none."""
        return max((float(state["step"]) for state in built.state.values() if "step" in state), default=0.0)

    def set_steps_done(self, built: "torch.optim.Optimizer", count: float) -> None:
        """Set the step count after the states were loaded. A rule without a count ignores it."""
        if not self.counts_steps:
            return
        import torch

        for owner, state in built.state.items():
            # One tensor per parameter, since torch increments each in place. It must be on the weights'
            # device, where torch's fused kernels read it.
            state["step"] = torch.tensor(count, device=owner.device)
