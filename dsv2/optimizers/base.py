"""What an optimizer is to the rest of the project: its rule, its state and its parameter groups.

The rule only: the learning rate of a step comes from training/schedule.py, the partition over ranks from
parallel/zero. Validation and the planner ask optimizers too, so nothing here imports torch at import time.
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
        """Elements that every rank holds alike."""
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
    tensors: "dict[str, Tensor]"  # 1-D views: "fp32" and the optimizer's states, or a buffer's "buffer"


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
        """Return the names of the tensors that it keeps per parameter of the group, each of its size."""

    @abstractmethod
    def update_copies(self, *, bf16_states: bool, fp32_gradient: bool) -> int:
        """Return how many fp32 copies of a tensor `update` makes with the reference kernels."""

    @abstractmethod
    def build(self, groups: list[dict[str, Any]], optim: OptimConfig) -> "torch.optim.Optimizer":
        """Return torch's optimizer for these groups. Every group has its own `weight_decay`."""

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
        """Update a shard in place: for ZeRO stages that do not use torch's optimizer.

        Args:
            shard: fp32 weights (bf16 with optim.states=bf16) and states.
            gradient: of the shard, fp32 or bf16.
            weight: the model's bf16 weights, written too; None if the shard holds them.
            scale: fp32 [], multiplies the gradient; NaN: nothing is changed.
            settings: the group's settings, as in torch's `param_groups`.
            step: of this update, counted from 1.
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
        """Return how many steps torch's optimizer has taken, where its rule counts them; else 0."""
        return max((float(state["step"]) for state in built.state.values() if "step" in state), default=0.0)

    def set_steps_done(self, built: "torch.optim.Optimizer", count: float) -> None:
        """Set that count after the states were loaded, where the rule counts steps."""
        if not self.counts_steps:
            return
        import torch

        for owner, state in built.state.items():
            # A tensor for each, as they count up in place; torch's fused kernels read it beside the weights.
            state["step"] = torch.tensor(count, device=owner.device)
