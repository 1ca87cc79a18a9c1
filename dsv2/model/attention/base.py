"""The interface of a kind of attention: its spec (`AttentionKind`) and its module (`AttentionModule`).

A kind is two files. NAME.py holds the spec, which validation and the planner use. It does not import torch.
NAME_module.py holds the nn.Module that `build` returns. kinds.py lists all kinds.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

from dsv2.config.rules import refuse
from dsv2.config.schema import ModelConfig
from dsv2.kernels.specs import HeadWidths
from dsv2.parallel.micro_batch import MicroBatch, Table

if TYPE_CHECKING:
    from torch import Tensor

    from dsv2.kernels.sets import KernelSet
    from dsv2.model.rope import Angles


class AttentionKind(ABC):
    """The spec of one kind of attention."""

    name: str  # the value of model.attention

    @abstractmethod
    def check(self, model: ModelConfig) -> None:
        """Raise UserError for sizes that this kind cannot have."""

    def require_no_key_value_heads(self, model: ModelConfig) -> None:
        """Refuse num_key_value_heads for a kind whose number of key and value heads is fixed."""
        if model.num_key_value_heads is not None:
            right = f"must be null with model.attention={self.name}"
            refuse("model.num_key_value_heads", model.num_key_value_heads, right)

    @abstractmethod
    def parameters(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter of one layer, by its published name.

        Only norms are one-dimensional.
        """

    @abstractmethod
    def rotary_width(self, model: ModelConfig) -> int:
        """Return how many of a head's dimensions RoPE rotates."""

    @abstractmethod
    def score_width(self, model: ModelConfig) -> int:
        """Return a head's key width plus its value width. Attention's FLOPs are proportional to this sum."""

    @abstractmethod
    def cached_elements(self, model: ModelConfig) -> int:
        """Return the number of elements that decoding caches per token and layer."""

    def latent_heads(self, model: ModelConfig) -> HeadWidths | None:
        """Return the head widths that `latent_attention` gets; None if this kind never calls it."""
        return None

    @abstractmethod
    def kept_bytes(self, run: MicroBatch) -> Table:
        """Return the bytes of each tensor that one layer keeps for the backward pass."""

    @abstractmethod
    def peak_bytes(self, run: MicroBatch) -> float:
        """Return the peak bytes that one layer's backward pass needs beyond `kept_bytes`."""

    @abstractmethod
    def published(self, model: ModelConfig) -> dict[str, Any]:
        """Return this kind's fields of a Hugging Face config.json.

        Raises:
            UserError: Hugging Face's architecture has no such attention.
        """

    def published_defaults(self, model: ModelConfig) -> dict[str, Any]:
        """Return what a config.json means that leaves out fields of `published`, or has null there."""
        return {}

    @abstractmethod
    def build(self, model: ModelConfig, kernels: "KernelSet") -> "AttentionModule":
        """Return the nn.Module of one layer."""


class AttentionModule(Protocol):
    """The nn.Module of one layer's attention."""

    projections: tuple[str, ...]  # names of methods that the profiler counts as projections

    def __call__(self, x_BSD: "Tensor", angles: "Angles") -> "Tensor":
        """Return causal attention over whole sequences, [B, S, D]."""
        ...

    def cached(self, x_BSD: "Tensor", angles: "Angles") -> "tuple[Tensor, ...]":
        """Return what decoding keeps per token: any number of tensors [B, S, ...]."""
        ...

    def decode(
        self, x_B1D: "Tensor", angles: "Angles", kept: "tuple[Tensor, ...]", visible_BC: "Tensor"
    ) -> "Tensor":
        """Return [B, 1, D] for one new token per sequence.

        Args:
            kept: what `cached` returned for C positions, including the new token's.
            visible_BC: bool; the positions that the new token attends to.
        """
        ...
