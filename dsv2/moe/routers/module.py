"""The interface of a router's nn.Module."""

from torch import Tensor, nn

from dsv2.kernels.types import Routing


class RouterModule(nn.Module):
    """Chooses the experts of each token. Buffers, such as a bias, are saved and exported by their names."""

    weight: nn.Parameter  # [E, D], the experts' centroids e_i

    def forward(self, x_TD: Tensor) -> Routing:
        """Return the experts with their affinities, and the weights of their outputs.

        Losses and token dropping use the affinities, never the weights.
        """
        raise NotImplementedError

    def after_step(self, load_E: Tensor) -> None:
        """Update the buffers after an optimizer step; most routers have none.

        Args:
            load_E: how many tokens of the global batch selected each expert, before dropping.
        """
