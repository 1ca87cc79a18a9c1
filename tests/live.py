"""The bytes of all tensors that are alive, as torch makes and frees their storages."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While it is entered: `total` bytes of the storages made since and not yet freed, and their `peak`.

    A storage that was there before, such as a weight's, is not counted: name it in `known`.
    """

    def __init__(self, known: list[torch.Tensor] | None = None):
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known or []}
        self._sizes: dict[int, int] = {}
        self.total = self.peak = 0

    def _freed(self, storage: int) -> None:
        self.total -= self._sizes.pop(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, torch.Tensor) or leaf.device.type == "meta":
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if storage.nbytes() and key not in self._sizes and key not in self._known:
                self._sizes[key] = storage.nbytes()
                self.total += storage.nbytes()
                weakref.finalize(storage, self._freed, key)
                self.peak = max(self.peak, self.total)
        return out
