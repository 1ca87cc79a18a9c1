"""Initial weights: N(0, initializer_range) for every matrix, 1 for every norm (appendix B.1).

Every parameter, and every single expert, is drawn from its own generator, seeded by its name. So the initial
weights are the same on every layout, on one kind of device. A rank draws only the experts it holds.
"""

import zlib

import torch
from torch import nn

from dsv2.moe.experts import RoutedExperts


def _normal_(tensor: torch.Tensor, std: float, seed: int, name: str) -> None:
    # The CPU's generator uses 32 bits of a seed, so the run's seed and the name are hashed to 32 bits.
    generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    tensor.copy_(torch.randn(tensor.shape, generator=generator, device=tensor.device) * std)


@torch.no_grad()
def init_weights(model: nn.Module, std: float, seed: int) -> None:
    """Fill all parameters in place. The values are drawn in fp32 on the parameter's device."""
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            if isinstance(module, nn.RMSNorm):
                parameter.fill_(1.0)
            elif isinstance(module, RoutedExperts):
                for index, weight in enumerate(parameter):
                    _normal_(weight, std, seed, f"{name}.{module.first_expert + index}")
            else:
                _normal_(parameter, std, seed, name)


def materialize(model: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
    """Allocate a model that was built on the meta device, in place; its parameters get `dtype`.

    Buffers keep their own dtype. A buffer on the meta device becomes zeros. A module whose buffer starts with
    other values must build the buffer on an explicit device.
    """
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    model.to(dtype).to_empty(device=device)
    for module, name, buffer in buffers:
        if buffer.is_meta:
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
        else:
            setattr(module, name, buffer.to(device))
