"""The interface of a router's spec: checks, sizes, traffic and memory. Imports no torch.

A router is two files: NAME.py holds the spec, and NAME_module.py holds the `RouterModule` that `build`
returns (see module.py). kinds.py lists all routers.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from dsv2.config.schema import ModelConfig
from dsv2.moe.sizes import Shapes
from dsv2.parallel.micro_batch import MicroBatch, Table

if TYPE_CHECKING:
    from dsv2.kernels.sets import KernelSet
    from dsv2.moe.routers.module import RouterModule


class Router(ABC):
    """The spec of one way to choose a token's experts."""

    name: str  # the value of model.router

    @abstractmethod
    def check(self, model: ModelConfig) -> None:
        """Raise a UserError for sizes that this router cannot have."""

    @abstractmethod
    def parameters(self, model: ModelConfig) -> Shapes:
        """Return the shape of every parameter of one layer's router, by its name under `mlp.gate`."""

    @abstractmethod
    def mean_ranks(self, model: ModelConfig, ep_size: int) -> float:
        """Return the mean number of ranks that hold a token's experts, if all experts are equally likely."""

    @abstractmethod
    def kept_bytes(self, run: MicroBatch) -> Table:
        """Return the bytes of each tensor that one layer's router keeps for the backward pass."""

    @abstractmethod
    def published(self, model: ModelConfig) -> dict[str, Any]:
        """Return this router's fields of a Hugging Face config.json.

        Raises:
            UserError: Hugging Face's architecture has no such router.
        """

    def read_published(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return a config.json's fields as `published` writes them for the same routing.

        Args:
            content: the file's fields, without those that are null.
        """
        return content

    @abstractmethod
    def build(self, model: ModelConfig, kernels: "KernelSet") -> "RouterModule":
        """Return the nn.Module of one layer."""
