"""A copy of a rank's shards in host memory. A save can write it while training changes the originals."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch

from dsv2.optimizers.base import Shard

ALIGNMENT = 16  # bytes; a tensor must begin at a multiple of its elements' size


class HostCopy:
    """Memory for one copy; every save uses it again. For a GPU it is pinned: only then is copying fast.

    Args:
        sizes: bytes of each tensor that will be copied.
        device: where the tensors are.
    """

    def __init__(self, sizes: Iterable[int], device: torch.device):
        self._device = device
        size = sum(map(_aligned, sizes))
        self._memory = torch.empty(size, dtype=torch.uint8)
        if device.type == "cuda" and size:
            # torch would round pinned memory up to a power of two.
            cudart: Any = torch.cuda.cudart()
            problem = cudart.cudaHostRegister(self._memory.data_ptr(), size, 0)
            if int(problem):
                warnings.warn(
                    f"{size / 2**30:.1f} GiB of host memory could not be pinned (CUDA error {int(problem)}); "
                    "saves will stop training for longer",
                    stacklevel=1,
                )

    def of(self, shards: Iterable[Shard]) -> list[Shard]:
        """Copy the shards. The copy is valid until the next call."""
        begin = 0
        copies = []
        for shard in shards:
            tensors = {}
            for key, tensor in shard.tensors.items():
                part = self._memory[begin : begin + tensor.nbytes].view(tensor.dtype)
                tensors[key] = part.copy_(tensor, non_blocking=True)
                begin += _aligned(tensor.nbytes)
            copies.append(shard._replace(tensors=tensors))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return copies


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
