"""Two modules: RMSNorm of one tensor, such as a latent, and RMSNorm of the residual stream."""

from torch import Tensor, nn

from dsv2.kernels.sets import REFERENCE, KernelSet


class RMSNorm(nn.RMSNorm):
    """Returns x / rms(x) * weight over the last dimension."""

    def __init__(self, width: int, eps: float, kernels: KernelSet = REFERENCE):
        super().__init__(width, eps=eps)
        self.epsilon = eps
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.epsilon)


class ResidualNorm(RMSNorm):
    """Returns the residual stream x + change, or x without a change, and its RMSNorm."""

    def forward(self, x: Tensor, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.kernels.add_rms_norm(x, change, self.weight, self.epsilon)
