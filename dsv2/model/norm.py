"""RMSNorm as modules: of a latent, and in the residual stream."""

from torch import Tensor, nn

from dsv2.kernels.sets import REFERENCE, KernelSet


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, width: int, eps: float, kernels: KernelSet = REFERENCE):
        super().__init__(width, eps=eps)
        self.epsilon = eps
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.epsilon)


class ResidualNorm(RMSNorm):
    """(x + change, its norm), or (x, its norm) without a change; the stream continues with the first."""

    def forward(self, x: Tensor, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.kernels.add_rms_norm(x, change, self.weight, self.epsilon)
